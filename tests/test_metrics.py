"""Ranking metrics against scipy, against brute force over orders, and at the edges."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
import scipy.stats
import torch

from fastrank import metrics

ALL = (
    metrics.pairwise_accuracy,
    metrics.kendall_tau,
    metrics.ndcg,
    metrics.mrr,
    metrics.top1_accuracy,
)


def _random_group(generator: random.Random, *, tied_scores: bool, size: int | None = None):
    size = size or generator.randint(2, 6)
    levels = 3 if tied_scores else 10_000
    rewards = [float(generator.randint(0, 3)) for _ in range(size)]
    rewards[0], rewards[-1] = 5.0, -1.5  # a strict pair, and a negative reward
    generator.shuffle(rewards)
    return [generator.randint(0, levels) / 7 - 3 for _ in range(size)], rewards


def _orders(scores: list[float]) -> list[tuple[int, ...]]:
    """Every order of the candidates that agrees with the scores, ties in every possible way."""
    return [
        order
        for order in itertools.permutations(range(len(scores)))
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order))
    ]


def _reference(name: str, scores: list[float], rewards: list[float]) -> float:
    """The mean over all orders of the textbook definition on a strict order."""
    values = []
    for order in _orders(scores):
        ranked = [rewards[i] for i in order]
        if name == "pairwise_accuracy":
            pairs = [(a, b) for a, b in itertools.combinations(ranked, 2) if a != b]
            values.append(sum(a > b for a, b in pairs) / len(pairs))
        elif name == "top1_accuracy":
            values.append(float(ranked[0] == max(rewards)))
        elif name == "mrr":
            values.append(1 / (1 + ranked.index(max(rewards))))
        else:
            gains = [r - min(rewards) for r in ranked]
            dcg = sum(g / math.log2(2 + i) for i, g in enumerate(gains))
            ideal = sum(g / math.log2(2 + i) for i, g in enumerate(sorted(gains, reverse=True)))
            values.append(dcg / ideal)
    return sum(values) / len(values)


@pytest.mark.parametrize("tied_scores", [False, True])
@pytest.mark.parametrize("name", ["pairwise_accuracy", "top1_accuracy", "mrr", "ndcg"])
def test_equals_the_mean_over_all_orders_of_tied_candidates(name: str, tied_scores: bool) -> None:
    generator = random.Random(5)
    groups = [_random_group(generator, tied_scores=tied_scores) for _ in range(60)]
    expected = sum(_reference(name, *group) for group in groups) / len(groups)
    got = getattr(metrics, name)([g[0] for g in groups], [g[1] for g in groups])
    assert got == pytest.approx(expected, abs=1e-12)
    for scores, rewards in groups[:20]:  # each group, not only the mean
        assert getattr(metrics, name)([scores], [rewards]) == pytest.approx(
            _reference(name, scores, rewards), abs=1e-12
        )


@pytest.mark.parametrize("tied_scores", [False, True])
def test_kendall_tau_equals_scipy(tied_scores: bool) -> None:
    generator = random.Random(6)
    for size in (2, 3, 5, 17, 64):
        for _ in range(10):
            scores, rewards = _random_group(generator, tied_scores=tied_scores, size=size)
            expected = scipy.stats.kendalltau(scores, rewards).statistic
            expected = 0.0 if math.isnan(expected) else expected  # all scores equal
            assert metrics.kendall_tau([scores], [rewards]) == pytest.approx(expected, abs=1e-12)


def test_ndcg_cut_after_k() -> None:
    scores, rewards = [3.0, 2.0, 1.0, 0.0], [1.0, 0.0, 5.0, 2.0]
    gains = [1.0, 0.0, 5.0, 2.0]
    dcg = gains[0] + gains[1] / math.log2(3)
    ideal = 5.0 + 2.0 / math.log2(3)
    assert metrics.ndcg([scores], [rewards], k=2) == pytest.approx(dcg / ideal)
    assert metrics.ndcg([scores], [rewards], k=9) == pytest.approx(
        metrics.ndcg([scores], [rewards])
    )
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        metrics.ndcg([scores], [rewards], k=0)


def test_equal_scores_on_best_first_data_are_chance() -> None:
    scores, rewards = [[0.0, 0.0, 0.0, 0.0]], [[3.0, 2.0, 1.0, 0.0]]
    assert metrics.pairwise_accuracy(scores, rewards) == 0.5
    assert metrics.kendall_tau(scores, rewards) == 0.0
    assert metrics.top1_accuracy(scores, rewards) == 0.25
    assert metrics.mrr(scores, rewards) == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)
    assert metrics.ndcg(scores, rewards) < 0.9


@pytest.mark.parametrize("function", ALL)
def test_scores_of_minus_infinity_are_below_every_other(function) -> None:
    """Also two of them, which tie, in a group of another width that is padded with the same."""
    generator = random.Random(8)
    groups = [_random_group(generator, tied_scores=True, size=n) for n in (3, 4, 5, 6)]
    infinite = [
        ([-math.inf if s == min(own) else s for s in own], rewards) for own, rewards in groups
    ]
    infinite.append(([-math.inf, -math.inf], [1.0, 0.0]))
    lower = [([max(s, -99.0) for s in own], rewards) for own, rewards in infinite]
    found, expected = (function(*zip(*some, strict=True)) for some in (infinite, lower))
    assert found == expected


@pytest.mark.parametrize("function", ALL)
def test_groups_without_a_pair_are_left_out(function) -> None:
    informative = ([0.1, 0.4, 0.2], [0.0, 1.0, 2.0])
    alone = function([informative[0]], [informative[1]])
    mixed = function(
        [[1.0], informative[0], [3.0, 1.0], []], [[4.0], informative[1], [2.0, 2.0], []]
    )
    assert mixed == alone
    assert math.isnan(function([[1.0, 2.0]], [[1.0, 1.0]]))
    assert math.isnan(function([], []))


@pytest.mark.parametrize("function", ALL)
def test_flat_arrays_with_offsets_equal_lists(function) -> None:
    generator = random.Random(7)
    groups = [_random_group(generator, tied_scores=True, size=n) for n in (2, 30, 3, 3, 7, 2, 64)]
    cu_groups = torch.tensor(
        [0, *itertools.accumulate(len(g[0]) for g in groups)], dtype=torch.int32
    )
    flat_scores = torch.tensor([s for g in groups for s in g[0]], dtype=torch.float64)
    flat_rewards = np.array([r for g in groups for r in g[1]])
    expected = sum(function([s], [r]) for s, r in groups) / len(groups)
    assert function(flat_scores, flat_rewards, cu_groups=cu_groups) == pytest.approx(
        expected, abs=1e-12
    )


def test_many_groups_are_split_into_blocks(monkeypatch) -> None:
    generator = random.Random(8)
    groups = [_random_group(generator, tied_scores=True, size=n % 23 + 2) for n in range(200)]
    scores, rewards = [g[0] for g in groups], [g[1] for g in groups]
    whole = metrics.ranking_metrics(scores, rewards)
    monkeypatch.setattr(metrics, "_BLOCK_ELEMENTS", 1000)
    assert metrics.ranking_metrics(scores, rewards) == pytest.approx(whole, abs=1e-12)
    for name, value in whole.items():
        assert getattr(metrics, name)(scores, rewards) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize(
    ("scores", "rewards", "cu_groups", "message"),
    [
        ([[1.0]], [[1.0], [2.0]], None, "equally many groups, got 1 and 2"),
        ([[1.0, 2.0]], [[1.0, 2.0, 3.0]], None, "group 0 must have as many .* got 2 and 3"),
        ([[1.0, math.nan]], [[1.0, 2.0]], None, "scores must be below inf, got nan"),
        ([[1.0, math.inf]], [[1.0, 2.0]], None, "scores must be below inf, got inf"),
        ([[1.0, 2.0]], [[1.0, math.inf]], None, "rewards must be finite, got inf"),
        ([[[1.0, 2.0]]], [[1.0, 2.0]], None, "scores must be one-dimensional"),
        ([1.0, 2.0], [1.0, 2.0], [0, 1], "cu_groups must end at 2 .* got 1"),
        ([1.0, 2.0], [1.0, 2.0], [0, 2, 1, 2], "start at 0 and never fall"),
        ([1.0, 2.0], [1.0, 2.0], [1, 2], "start at 0 and never fall"),
    ],
)
def test_wrong_input_says_what_came(scores, rewards, cu_groups, message) -> None:
    with pytest.raises(ValueError, match=message):
        metrics.pairwise_accuracy(scores, rewards, cu_groups=cu_groups)
