"""A whole training step on a GPU: nothing waits for the device, and it can be captured."""

from __future__ import annotations

import pytest
import torch
from architectures import build
from pack_cases import one_pack, random_groups
from torch import Tensor

import fastrank

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LAYOUT = [(40, [30, 17, 29, 8]), (21, [14, 12]), (5, [33, 20, 9])]
LOSSES = [fastrank.RRHF(), fastrank.PRO()]


def prepared(attention: str = "auto"):
    model = build("llama", head_dim=16).to("cuda", torch.bfloat16)
    return fastrank.prepare_model(model, attention=attention)


def step(model, pack, loss) -> Tensor:
    value = model(pack=pack, loss=loss).loss
    value.backward()
    return value.detach()


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_a_dense_step_waits_for_nothing(loss):
    """From a pack that is not pinned; the first steps compile, and try the device."""
    model, host = prepared(), one_pack(random_groups(LAYOUT))
    for _ in range(2):
        step(model, host.to("cuda", non_blocking=True), loss)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(model, host.to("cuda", non_blocking=True), loss)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_a_captured_step_is_replayed(loss):
    """New weights, the captured pack: value and gradients are those of a step without a graph."""
    model, pack = prepared(), one_pack(random_groups(LAYOUT)).to("cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(model, pack, loss)
            model.zero_grad(set_to_none=True)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(model, pack, loss)
    held = {name: p.grad for name, p in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    graph.replay()
    torch.cuda.synchronize()
    replayed = captured.clone(), {name: grad.clone() for name, grad in held.items()}
    model.zero_grad(set_to_none=True)
    expected = step(model, pack, loss)
    torch.testing.assert_close(replayed[0], expected, rtol=1e-3, atol=1e-3)
    for name, parameter in model.named_parameters():
        error = (replayed[1][name] - parameter.grad).float().norm()
        assert error <= 2e-2 * parameter.grad.float().norm(), name


def test_two_phases_find_the_same_scores_again():
    model, groups = prepared("segmentwise"), random_groups(LAYOUT)
    run = {"loss": fastrank.RRHF(), "max_tokens": 90}
    first = fastrank.two_phase_backward(model, groups, **run)
    model.zero_grad()
    again = fastrank.two_phase_backward(model, groups, **run)
    assert torch.equal(first.scores, again.scores)


def test_flatten_on_the_device():
    labels = torch.full((3, 6), -100)
    labels[0, 2:5], labels[1, 1], labels[2, 3:] = 7, 3, torch.arange(3)
    hidden = torch.randn(3, 6, 4)
    expected = fastrank.flatten(hidden, labels)
    found = fastrank.flatten(hidden.cuda(), labels.cuda())
    assert all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True))
