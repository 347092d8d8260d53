"""What the losses and the two-phase step ask of a GPU: no waiting beside what their docstrings say.

Runs on the ``meta`` device, which has no values: whatever needs one on the host fails.
"""

from __future__ import annotations

import functools

import pytest
import torch
from architectures import build
from attention_cases import DeviceTraffic
from pack_cases import one_pack, random_groups
from plain_linear import make_problem
from torch import Tensor

import fastrank
from fastrank.data.packing import Pack
from fastrank.modeling.heads import logits_fallback
from fastrank_kernels import ops, reference

META = torch.device("meta")
LAYOUT = [(7, [3, 1, 9]), (2, [4, 2])]


def test_flatten_asks_the_device_once(monkeypatch):
    labels = torch.full((3, 6), -100)
    labels[0, 2:5], labels[1, 1], labels[2, 3:] = 7, 3, torch.arange(3)
    answers = [torch.tensor([[3, 1, 3], [0, 0, 0]])]
    monkeypatch.setattr(Tensor, "cpu", lambda self: answers.pop())
    rows, found, offsets = fastrank.flatten(torch.empty(3, 6, 4, device=META), labels.to(META))
    assert not answers and rows.shape == found.shape == (7,)
    assert rows.is_meta and found.is_meta and offsets.tolist() == [0, 3, 4, 7]


@pytest.mark.parametrize("loss", [fastrank.RRHF(), fastrank.PRO(), fastrank.RankNet()], ids=repr)
def test_weights_of_the_supervised_term_need_no_value(loss):
    """Also with an empty group, which has no best candidate."""
    rewards = torch.tensor([1.0, 4.0, 4.0, 2.0, 2.0])
    offsets = torch.tensor([0, 3, 3, 5], dtype=torch.int32)
    spec = loss.spec()
    found = reference.sft_weights(rewards, offsets, spec, torch.float64)
    growth = (2**2, 1**2) if spec.sft_growth == "square" else (1, 1)
    expected = torch.zeros(5, dtype=torch.float64)
    expected[1], expected[3] = spec.sft_weight * growth[0], spec.sft_weight * growth[1]
    assert torch.equal(found, expected)
    there = reference.sft_weights(rewards.to(META), offsets.to(META), spec, torch.float64)
    assert there.shape == (5,)


def test_a_model_s_own_logits_need_no_value():
    model = build("llama").to(META)
    pack = one_pack(random_groups(LAYOUT)).to(META, non_blocking=True)
    inputs = {"input_ids": pack.input_ids, "position_ids": pack.position_ids}
    assert logits_fallback(model, model.forward, inputs, pack).shape == pack.labels.shape


def test_a_pack_goes_to_a_device_without_waiting():
    pack = one_pack(random_groups(LAYOUT))
    with DeviceTraffic() as traffic:
        there = pack.to(META, non_blocking=True)
    assert not traffic.blocking and there.labels.is_meta and there.cu_responses_device.is_meta
    assert not there.cu_responses.is_meta and there.to(META, non_blocking=True).rows is there.rows
    with DeviceTraffic() as traffic:
        pack.to(META)
    assert len(traffic.blocking) == 7


def test_two_phases_do_not_wait_for_their_packs(monkeypatch):
    waited = []
    move = Pack.to

    @functools.wraps(move)
    def to(self, device, non_blocking=False):
        waited.append(not non_blocking)
        return move(self, device, non_blocking)

    model = fastrank.prepare_model(build("llama"))
    options = {"loss": fastrank.RRHF(), "max_tokens": 16}
    fastrank.two_phase_backward(model, random_groups(LAYOUT), **options)  # has checked the model
    monkeypatch.setattr(Pack, "to", to)
    fastrank.two_phase_backward(model, random_groups(LAYOUT), **options)
    assert len(waited) >= 4 and not any(waited)


def test_offsets_that_are_there_are_not_sent(monkeypatch):
    """A step that is captured in a CUDA graph may copy nothing from the host."""
    problem = make_problem(3)
    expected = problem.fused(fastrank.PRO())
    copies = (problem.cu_responses.clone(), problem.cu_groups.clone())

    def refuse(tensor: Tensor, device: torch.device) -> Tensor:
        raise AssertionError(f"{list(tensor.shape)} sent to {device}")

    monkeypatch.setattr(ops, "send", refuse)
    found = problem.fused(fastrank.PRO(), device_offsets=copies)
    assert torch.equal(found.loss, expected.loss)
    for a, b in zip(
        torch.autograd.grad(found.loss, problem.leaves()),
        torch.autograd.grad(expected.loss, problem.leaves()), strict=True,
    ):  # fmt: skip
        assert torch.equal(a, b)
    with pytest.raises(AssertionError, match="sent to cpu"):
        problem.fused(fastrank.PRO())


def test_wrong_copies_of_offsets_are_refused():
    problem = make_problem(3)
    good = (problem.cu_responses, problem.cu_groups)
    short = (good[0], good[1][:-1])
    with pytest.raises(ValueError, match="device_offsets of cu_groups must have shape"):
        problem.fused(fastrank.PRO(), device_offsets=short)
    with pytest.raises(ValueError, match="device_offsets of cu_responses must be on cpu, got meta"):
        problem.fused(fastrank.PRO(), device_offsets=tuple(x.to(META) for x in good))


def test_a_model_takes_its_pack_s_copies(monkeypatch):
    model = fastrank.prepare_model(build("llama"))
    pack = one_pack(random_groups(LAYOUT))
    expected = model(pack=pack, loss=fastrank.RRHF()).loss
    monkeypatch.setattr(ops, "send", None)
    assert torch.equal(model(pack=pack, loss=fastrank.RRHF()).loss, expected)
