"""Training in two phases on a GPU, where scores and coefficients come from the Triton kernels."""

from __future__ import annotations

import pytest
import torch
import two_phase_processes as small
from pack_cases import assert_same_gradients, one_pack, take_gradients
from torch import Tensor

import fastrank

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def joint(model, groups, loss) -> dict[str, Tensor]:
    model(pack=one_pack(groups), loss=loss).loss.backward()
    return take_gradients(model)


@pytest.mark.parametrize("loss", [fastrank.RRHF(), fastrank.PRO(), fastrank.ListMLE()], ids=repr)
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_gradients_equal_those_of_joint_training(loss, backend):
    model = fastrank.prepare_model(small.make_model("plain").cuda(), attention="segmentwise")
    groups = small.make_groups()
    expected = joint(model, groups, loss)
    output = fastrank.two_phase_backward(
        model, groups, loss=loss, max_tokens=small.MAX_TOKENS, backend=backend
    )
    assert output.scores.is_cuda and output.tokens_scored > output.tokens_joint
    assert_same_gradients(take_gradients(model), expected, 1e-5)


def test_under_autocast_it_is_no_further_from_float32_than_joint_training():
    model = fastrank.prepare_model(small.make_model("plain").cuda(), attention="segmentwise")
    groups, loss = small.make_groups(), fastrank.PRO()
    exact = joint(model, groups, loss)
    with torch.autocast("cuda", torch.bfloat16):
        rounded = joint(model, groups, loss)
        fastrank.two_phase_backward(model, groups, loss=loss, max_tokens=small.MAX_TOKENS)
    for name, gradient in take_gradients(model).items():
        error = float((rounded[name] - exact[name]).norm())
        assert float((gradient - exact[name]).norm()) <= 2 * error + 1e-3, name


def test_a_model_with_dropout_it_does_not_state_is_found_by_the_device_s_random_numbers():
    model = small.make_model("plain").cuda().train()
    fastrank.prepare_model(model, attention="segmentwise")
    model.model.embed_tokens.register_forward_hook(
        lambda module, inputs, output: torch.nn.functional.dropout(output, 0.1)
    )
    with pytest.raises(fastrank.InputError, match="draws random numbers"):
        fastrank.two_phase_backward(
            model, small.make_groups(), loss=fastrank.RRHF(), max_tokens=small.MAX_TOKENS
        )
