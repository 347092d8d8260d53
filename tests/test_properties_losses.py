"""Invariants of every loss: symmetries, zeros, independence of groups."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastrank
from fastrank import Loss

ALL: list[Loss] = [
    fastrank.RRHF(),
    fastrank.RRHF(margin=0.5, pairs="best_worst"),
    fastrank.PRO(),
    fastrank.RankNet(),
    fastrank.SLiC(),
    fastrank.SimPO(),
    fastrank.IPO(),
    fastrank.DPO(),
    fastrank.DPO(pairs="best_worst"),
    fastrank.LambdaRank(),
    fastrank.ListMLE(),
    fastrank.ListMLE(top_k=2),
    fastrank.ListNet(),
    fastrank.ListNet(temperature=3.0),
    fastrank.RRHF(margin=0.5, margin_by="rank"),
    fastrank.SimPO(margin_by="reward", label_smoothing=0.1),
    fastrank.DPO(label_smoothing=0.2, robust=True, rank_weight=0.5),
    fastrank.REBEL(),
    fastrank.PRO(stage_scale="one", top_k=2),
    fastrank.NCA(beta=1.0),
    fastrank.LIRE(),
    fastrank.LIRE(value="softmax"),
    fastrank.ApproxNDCG(),
]
#: PRO multiplies each score by a reward gap and NCA looks at each score by itself, so scores that
#: all rise together change them.
OF_DIFFERENCES = [loss for loss in ALL if not isinstance(loss, (fastrank.PRO, fastrank.NCA))]
PAIRWISE = [loss for loss in ALL if hasattr(loss, "pairs")]

losses = st.sampled_from(ALL)
scores_of = st.floats(-30, 30, width=32)
rewards_of = st.integers(-8, 8).map(lambda k: k / 4)  # ties are likely, differences exact


@st.composite
def groups(draw: Any, ties: bool = True, least: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Scores float64 [C], rewards float64 [C], offsets of one to five groups of up to 9."""
    sizes = draw(st.lists(st.integers(least, 9), min_size=1, max_size=5))
    scores, rewards = [], []
    for n in sizes:
        scores += draw(st.lists(scores_of, min_size=n, max_size=n))
        rewards += draw(st.lists(rewards_of, min_size=n, max_size=n, unique=not ties))
    offsets = torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32)
    return _double(scores), _double(rewards), offsets


def _double(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def value_and_gradient(
    loss: Loss, scores: Tensor, rewards: Tensor, offsets: Tensor, upstream: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """[G] values, and the gradient of their (weighted) sum."""
    scores = scores.clone().requires_grad_()
    values = fastrank.ranking_loss(scores, rewards, loss=loss, cu_groups=offsets, reduction="none")
    weights = torch.ones_like(values) if upstream is None else upstream
    (gradient,) = torch.autograd.grad((values * weights).sum(), scores)
    return values.detach(), gradient


def _has_pair(rewards: Tensor, offsets: Tensor) -> Tensor:
    """[G] 1 for a group with a strict pair, else 0."""
    parts = [rewards[a:b] for a, b in itertools.pairwise(offsets.tolist())]
    return _double([float(len(part) > 0 and bool(part.max() > part.min())) for part in parts])


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@settings(max_examples=150, deadline=None)
@given(loss=losses, case=groups(ties=False), data=st.data())
def test_the_order_of_candidates_without_ties_does_not_matter(
    loss: Loss, case: tuple[Tensor, Tensor, Tensor], data: st.DataObject
) -> None:
    scores, rewards, offsets = case
    if isinstance(loss, fastrank.LambdaRank):  # ranks by score: ties there go by index
        scores = scores + torch.arange(len(scores)) * 1e-4
    order: list[int] = []
    for a, b in itertools.pairwise(offsets.tolist()):
        order += data.draw(st.permutations(range(a, b)))
    values, gradient = value_and_gradient(loss, scores, rewards, offsets)
    moved, moved_gradient = value_and_gradient(loss, scores[order], rewards[order], offsets)
    close(moved, values)
    close(moved_gradient, gradient[order])


@settings(max_examples=100, deadline=None)
@given(loss=st.sampled_from(PAIRWISE), case=groups(), data=st.data())
def test_pairs_do_not_depend_on_the_order_even_with_ties(
    loss: Loss, case: tuple[Tensor, Tensor, Tensor], data: st.DataObject
) -> None:
    scores, rewards, offsets = case
    by_rank = getattr(loss, "margin_by", "constant") == "rank"
    if loss.pairs != "all" or by_rank or isinstance(loss, fastrank.LambdaRank):
        return  # best and worst, and places, of tied ones, and ranks among tied scores: by index
    order: list[int] = []
    for a, b in itertools.pairwise(offsets.tolist()):
        order += data.draw(st.permutations(range(a, b)))
    values, gradient = value_and_gradient(loss, scores, rewards, offsets)
    moved, moved_gradient = value_and_gradient(loss, scores[order], rewards[order], offsets)
    close(moved, values)
    close(moved_gradient, gradient[order])


@settings(max_examples=150, deadline=None)
@given(loss=st.sampled_from(OF_DIFFERENCES), case=groups(), shift=st.integers(-64, 64))
def test_scores_that_rise_together_change_nothing(
    loss: Loss, case: tuple[Tensor, Tensor, Tensor], shift: int
) -> None:
    scores, rewards, offsets = case
    scores = (scores * 64).round() / 64  # so that adding the shift rounds nothing
    values, gradient = value_and_gradient(loss, scores, rewards, offsets)
    shifted, shifted_gradient = value_and_gradient(loss, scores + shift, rewards, offsets)
    close(shifted, values)
    close(shifted_gradient, gradient)
    for a, b in itertools.pairwise(offsets.tolist()):
        total, size = gradient[a:b].sum().abs(), gradient[a:b].abs().sum()
        assert total <= 1e-12 * max(1.0, float(size))  # the same, said of the gradient


@settings(max_examples=100, deadline=None)
@given(loss=losses, case=groups(), shift=st.integers(-16, 16))
def test_rewards_that_rise_together_change_nothing(
    loss: Loss, case: tuple[Tensor, Tensor, Tensor], shift: int
) -> None:
    scores, rewards, offsets = case
    values, gradient = value_and_gradient(loss, scores, rewards, offsets)
    shifted, shifted_gradient = value_and_gradient(loss, scores, rewards + shift, offsets)
    if loss == fastrank.LIRE():  # the expected reward itself
        values = values - shift * _has_pair(rewards, offsets)
    close(shifted, values)
    close(shifted_gradient, gradient)


@settings(max_examples=100, deadline=None)
@given(
    loss=losses,
    scores=st.lists(scores_of, min_size=1, max_size=12),
    reward=rewards_of,
    cut=st.integers(0, 12),
)
def test_groups_without_a_strict_pair_are_zero(
    loss: Loss, scores: list[float], reward: float, cut: int
) -> None:
    """Any number of equal rewards, in one group, in two, or alone each."""
    s, r = _double(scores), torch.full((len(scores),), reward, dtype=torch.float64)
    cut = min(cut, len(scores))
    for offsets in ([0, len(scores)], [0, cut, len(scores)], list(range(len(scores) + 1))):
        values, gradient = value_and_gradient(loss, s, r, torch.tensor(offsets).int())
        assert not values.any() and not gradient.any()


@settings(max_examples=100, deadline=None)
@given(loss=losses, case=groups(), data=st.data())
def test_groups_do_not_know_of_each_other(
    loss: Loss, case: tuple[Tensor, Tensor, Tensor], data: st.DataObject
) -> None:
    scores, rewards, offsets = case
    upstream = _double(
        data.draw(st.lists(scores_of, min_size=len(offsets) - 1, max_size=len(offsets) - 1))
    )
    values, gradient = value_and_gradient(loss, scores, rewards, offsets, upstream)
    for g, (a, b) in enumerate(itertools.pairwise(offsets.tolist())):
        alone = torch.tensor([0, b - a], dtype=torch.int32)
        value, own = value_and_gradient(loss, scores[a:b], rewards[a:b], alone, upstream[g : g + 1])
        close(values[g : g + 1], value)
        close(gradient[a:b], own)
    total = fastrank.ranking_loss(scores, rewards, loss=loss, cu_groups=offsets, reduction="sum")
    mean = fastrank.ranking_loss(scores, rewards, loss=loss, cu_groups=offsets)
    close(total, values.sum())
    close(mean, values.mean())


@settings(max_examples=100, deadline=None)
@given(loss=losses, case=groups(), data=st.data())
def test_a_dense_batch_is_the_ragged_one(
    loss: Loss, case: tuple[Tensor, Tensor, Tensor], data: st.DataObject
) -> None:
    """Candidates anywhere in their row, in order; the places between them hold nonsense."""
    scores, rewards, offsets = case
    sizes = offsets.diff().tolist()
    width = max(sizes) + data.draw(st.integers(0, 3))
    shape = (len(sizes), width)
    dense_s = torch.full(shape, float("nan"), dtype=torch.float64)
    dense_r = torch.full(shape, float("inf"), dtype=torch.float64)
    where = torch.zeros(shape, dtype=torch.bool)
    for g, (a, b) in enumerate(itertools.pairwise(offsets.tolist())):
        places = sorted(data.draw(st.permutations(range(width)))[: b - a])
        where[g, places] = True
        dense_s[g, places], dense_r[g, places] = scores[a:b], rewards[a:b]
    dense_s.requires_grad_()
    dense = fastrank.ranking_loss(dense_s, dense_r, loss=loss, where=where, reduction="none")
    upstream = torch.linspace(1, -2, len(sizes), dtype=torch.float64)
    values, gradient = value_and_gradient(loss, scores, rewards, offsets, upstream)
    close(dense.detach(), values)
    (got,) = torch.autograd.grad((dense * upstream).sum(), dense_s)
    close(got[where], gradient)
    assert not got[~where].any()


@settings(max_examples=100, deadline=None)
@given(case=groups())
def test_signs(case: tuple[Tensor, Tensor, Tensor]) -> None:
    """Hinge, logistic, square and likelihood terms are not negative; RRHF is zero when in order."""
    scores, rewards, offsets = case
    for loss in OF_DIFFERENCES:
        if getattr(loss, "robust", False):
            continue  # an estimate of a loss that is not negative, and may be so itself
        # An expected reward has any sign; ListNet is a cross-entropy, at least the target's entropy
        if not isinstance(loss, (fastrank.ListNet, fastrank.LIRE)):
            values, _ = value_and_gradient(loss, scores, rewards, offsets)
            assert (values >= 0).all(), loss
    in_order, gradient = value_and_gradient(fastrank.RRHF(), rewards * 3 - 1, rewards, offsets)
    assert not in_order.any() and not gradient.any()


@pytest.mark.parametrize("loss", ALL, ids=str)
def test_there_is_something_to_be_invariant(loss: Loss) -> None:
    """The properties above hold of a function that is always 0 as well; none of these is."""
    scores, rewards = _double([3.0, 1.0, -1.0, 0.5]), _double([0.0, 1.0, 3.0, 2.0])
    values, gradient = value_and_gradient(loss, scores, rewards, torch.tensor([0, 4]).int())
    assert abs(values.item()) > 0.05 and gradient.abs().max() > 0.005
