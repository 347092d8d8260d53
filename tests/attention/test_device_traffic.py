"""What attention asks of a GPU: no waiting, and as many launches for 16 candidates as for 2.

Runs on the ``meta`` device, which has no values: whatever needs one on the host fails.
"""

from __future__ import annotations

import pytest
import torch
from architectures import build
from attention_cases import DeviceTraffic, random_inputs, use_torch_varlen
from pack_cases import random_groups
from torch import Tensor

import fastrank
from fastrank.attention.backends import Backend, attend
from fastrank.attention.segments import SegmentTable
from fastrank.attention.visibility import FULL, Visibility

META = torch.device("meta")


@pytest.fixture(autouse=True)
def meta_is_a_gpu(monkeypatch):
    """Backends for CUDA serve ``meta``."""
    monkeypatch.setattr(Backend, "runs_on", lambda self, device: self.device != "cpu")
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # it does not know meta
    use_torch_varlen(monkeypatch)


def measure(
    lengths: list[tuple[int, list[int]]], backend: str, visibility: Visibility = FULL
) -> tuple[list[str], list[str]]:
    """Operators of one forward, and of its backward; nothing may wait for the device."""
    segments = SegmentTable.from_lengths(lengths)
    inputs = [
        t.detach().requires_grad_()
        for t in random_inputs(segments, 8, 2, 64, dtype=torch.bfloat16, device=META)
    ]
    with DeviceTraffic() as forward:
        out = attend(*inputs, segments, visibility=visibility, backend=backend)
    upstream = torch.empty_like(out)
    with DeviceTraffic() as backward:
        torch.autograd.grad(out, inputs, upstream)
    assert not forward.blocking and not backward.blocking
    return forward.launches, backward.launches


@pytest.mark.parametrize("backend", ["merge", "varlen"])
@pytest.mark.parametrize("groups", [1, 3])
def test_launches_do_not_depend_on_the_number_of_candidates(backend, groups):
    few, many = (measure([(20 + g, [5 + g] * n) for g in range(groups)], backend) for n in (2, 16))
    assert few == many
    forward, backward = few
    # One group's prompt is a view; the prompts of several are gathered once, each way.
    limits = {"merge": (11, 5) if groups == 1 else (13, 7), "varlen": (3, 3)}[backend]
    assert len(forward) <= limits[0] and len(backward) <= limits[1], few


def test_launches_do_not_depend_on_the_number_of_groups():
    for backend in ("merge", "varlen"):
        few, many = (measure([(20, [5, 7])] * groups, backend) for groups in (2, 9))
        assert few == many
    assert measure([(20, [5, 7])], "varlen", Visibility("sliding", 4)) == few


def test_waiting_is_noticed():
    values = torch.arange(5)
    with DeviceTraffic() as traffic:
        there = values.to(META, non_blocking=True)
        values.to(META)
    assert traffic.blocking == ["_to_copy"] and not traffic.launches
    for read in (there.sum().item, there.nonzero, there.cpu, there.tolist):
        with pytest.raises((RuntimeError, NotImplementedError)):
            read()


@pytest.mark.parametrize(
    ("model_type", "backend", "kernels"),
    [("llama", "auto", 2), ("qwen3", "merge", 2), ("llama", "varlen", 1), ("mistral", "auto", 1)],
)
def test_a_model_waits_for_nothing(model_type, backend, kernels):
    """Forward and backward of a whole model up to its last hidden states, over one pack; so many
    flash kernels per layer and direction."""
    from fastrank.modeling.prepare import _STATE, _pack_hidden

    model = build(model_type, dtype=torch.bfloat16)
    fastrank.prepare_model(model, attention=backend)
    (pack,) = fastrank.pack(random_groups([(7, [3, 1, 9]), (2, [4, 2])]), max_tokens=4096)
    model.to(META)
    with DeviceTraffic() as traffic:
        hidden: Tensor = _pack_hidden(
            model, model.__dict__[_STATE], pack.to(META, non_blocking=True)
        )
        hidden.float().sum().backward()
    assert not traffic.blocking
    flash = sum("flash_attention" in name for name in traffic.launches)
    assert flash == kernels * 2 * model.config.num_hidden_layers
