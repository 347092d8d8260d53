"""Losses of one's own give what the library's do where they write the same, on every path."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle

import pytest
import torch
from architectures import build
from own_losses import batched_rrhf, dpo, rrhf
from pack_cases import LARGE, one_pack, random_groups, take_gradients
from plain_linear import make_problem

import fastrank
from fastrank import FunctionLoss, InputError
from fastrank.ranking import ranking_from_logprobs

STRATEGIES = {
    "keep": (None, False),
    "recompute": (97 * 8 * 2, False),
    "unit": (97 * 8 * 2, True),
}
UPSTREAM = torch.tensor([0.7, -1.3, 2.0, 0.4, 3.0], dtype=torch.float64)


@dataclasses.dataclass(frozen=True)
class Scaled(fastrank.Loss):
    """A subclass with options of its own."""

    factor: float = 2.0
    kind: str = "relu"

    def rank_term(self, scores, rewards):
        return self.factor * rrhf(scores, rewards)


SAME = {
    "function": (FunctionLoss(rrhf, sft_weight=1.0), fastrank.RRHF()),
    "batched": (FunctionLoss(batched_rrhf, sft_weight=1.0), fastrank.RRHF()),
    "options": (
        FunctionLoss(rrhf, normalize=0.5, rank_weight=0.3, sft_weight=0.2, sft_reduction="sum"),
        fastrank.RRHF(normalize=0.5, rank_weight=0.3, sft_weight=0.2, sft_reduction="sum"),
    ),
    "reference": (FunctionLoss(dpo, normalize="sum"), fastrank.DPO()),
    "subtracted": (
        FunctionLoss(rrhf, uses_reference=True), fastrank.RRHF(sft_weight=0, uses_reference=True)
    ),
    "subclass": (Scaled(sft_weight=0.3), fastrank.RRHF(rank_weight=2.0, sft_weight=0.3)),
}  # fmt: skip


@pytest.mark.parametrize(("own", "library"), SAME.values(), ids=SAME)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_fused_equals_the_library(own, library, strategy, reduction) -> None:
    memory, frozen = STRATEGIES[strategy]
    problem = make_problem(3, frozen_head=frozen)
    factors = UPSTREAM if reduction == "none" else torch.tensor(-1.7)
    outputs, gradients = [], []
    for loss in (own, library):
        out = problem.fused(loss, reduction=reduction, logits_memory=memory)
        gradients.append(torch.autograd.grad((out.loss * factors).sum(), problem.leaves()))
        outputs.append([x.detach() for x in out])
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("own", "library"), SAME.values(), ids=SAME)
def test_from_scores_and_from_logprobs(own, library) -> None:
    problem = make_problem(5)
    logp = problem.logprobs().detach().requires_grad_()
    found = []
    for loss in (own, library):
        reference = problem.reference_scores if loss.uses_reference else None
        out = ranking_from_logprobs(
            logp, **problem.groups(), loss=loss, reference_scores=reference, reduction="none"
        )
        (grad,) = torch.autograd.grad((out.loss * UPSTREAM).sum(), logp)
        assert not out.scores.requires_grad and not out.rank_loss.requires_grad
        found.append([*(x.detach() for x in out), grad])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("function", [rrhf, batched_rrhf])
def test_dense_scores_with_masked_candidates(function) -> None:
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(6, 5, dtype=torch.float64, generator=generator)
    rewards = torch.randint(3, (6, 5), generator=generator).double()
    where = torch.rand(6, 5, generator=generator) < 0.7
    where[2] = False
    scores[~where] = float("nan")
    scores.requires_grad_()
    upstream = torch.linspace(-1, 2, 6, dtype=torch.float64)
    found = []
    for loss in (function, fastrank.RRHF()):
        values = fastrank.ranking_loss(scores, rewards, loss=loss, where=where, reduction="none")
        (grad,) = torch.autograd.grad((values * upstream).sum(), scores)
        found.append((values.detach(), grad))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_the_function_sees_groups_with_a_pair_only() -> None:
    seen = []

    def watch(scores, rewards):
        seen.append(rewards.tolist())
        return scores.sum()

    offsets = torch.tensor([0, 2, 2, 3, 6], dtype=torch.int32)
    scores = torch.arange(6.0, requires_grad=True)
    rewards = torch.tensor([1, 1, 0, 0, 2, 1])
    value = fastrank.ranking_loss(
        scores, rewards.float(), loss=watch, cu_groups=offsets, reduction="none"
    )
    assert seen == [[0, 2, 1]] and value.tolist() == [0, 0, 0, 12]
    value.sum().backward()
    assert scores.grad.tolist() == [0, 0, 0, 1, 1, 1]


def test_nothing_to_rank_still_has_a_graph() -> None:
    scores = torch.tensor([float("-inf"), 1.0], requires_grad=True)
    fastrank.ranking_loss(scores, torch.zeros(2), loss=rrhf).backward()
    assert scores.grad.tolist() == [0, 0]


@pytest.mark.parametrize(
    "own", [SAME["function"][0], SAME["batched"][0], rrhf], ids=["function", "batched", "bare"]
)
def test_two_phases_give_the_joint_gradients(own) -> None:
    model = fastrank.prepare_model(build("llama").train())
    groups = random_groups(LARGE, name="data")
    weight = 0.0 if own is rrhf else 1.0
    library = model(pack=one_pack(groups), loss=fastrank.RRHF(sft_weight=weight))
    library.loss.backward()
    expected = take_gradients(model)
    joint = model(pack=one_pack(groups), loss=own)
    joint.loss.backward()
    torch.testing.assert_close(joint.loss, library.loss)
    for found in (take_gradients(model), None):
        if found is None:
            output = fastrank.two_phase_backward(model, groups, loss=own, max_tokens=24)
            torch.testing.assert_close(output.loss, library.loss.detach())
            found = take_gradients(model)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=2e-6, rtol=1e-4)


WRONG = {
    "no tensor": (lambda s, r: 1.5, "must return a tensor, got float"),
    "shape": (lambda s, r: s, r"must return shape \[\], a scalar per group, got \[3\]"),
    "shape of a batch": (
        lambda s, r, cu_groups: s.sum(), r"must return shape \[1\], one value per group, got \[\]"
    ),
    "nan": (lambda s, r: s.sum() * float("nan"), "returned nan for 3 candidates whose scores are"),
    "detached": (lambda s, r: s.detach().sum(), "must be differentiable in scores"),
    "integers": (lambda s, r: (s > 0).sum(), "must return a floating dtype, got torch.int64"),
    "no reference": (lambda s, r, reference_scores: s.sum(), "takes reference_scores, got none"),
}  # fmt: skip


@pytest.mark.parametrize(("function", "text"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_trained_on_is_one_line(function, text) -> None:
    scores = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    with pytest.raises(InputError, match=text) as caught:
        fastrank.ranking_loss(scores, torch.tensor([1.0, 0.0, 2.0]), loss=function)
    assert "\n" not in str(caught.value)


def test_scores_that_are_not_finite_are_not_the_functions_fault() -> None:
    scores = torch.tensor([float("nan"), 2.0], requires_grad=True)
    assert fastrank.ranking_loss(scores, torch.tensor([1.0, 0.0]), loss=rrhf).isnan()


@pytest.mark.parametrize("wrong", [fastrank.RRHF, "rrhf", None, 3])
def test_what_is_no_loss_is_refused(wrong) -> None:
    with pytest.raises(TypeError, match="loss must be a fastrank loss .* or a function"):
        fastrank.ranking_loss(torch.zeros(2), torch.zeros(2), loss=wrong)
    with pytest.raises(ValueError, match="function must be a function, got"):
        FunctionLoss(wrong)


def test_it_is_a_value_that_survives_what_frameworks_do_to_arguments() -> None:
    loss = FunctionLoss(rrhf, sft_weight=0.5)
    assert loss == FunctionLoss(rrhf, sft_weight=0.5) and len({loss, copy.deepcopy(loss)}) == 1
    assert pickle.loads(pickle.dumps(loss)) == loss
    assert repr(loss) == "FunctionLoss(rrhf, sft_weight=0.5)"
    unnamed = pickle.dumps(FunctionLoss(lambda s, r: s.sum()))
    with pytest.raises(InputError, match="could not be pickled"):
        pickle.loads(unnamed)
    options = {"loss_kwargs": {"sft_weight": 2.0}, "use_cpu": True, "report_to": []}
    config = fastrank.RankConfig(loss=lambda s, r: s.sum(), **options)
    assert json.loads(config.to_json_string())["loss"] == "FunctionLoss(<lambda>, sft_weight=2.0)"
    assert dataclasses.replace(config, seed=3).ranking_loss == config.ranking_loss
    pickle.dumps(config)
