"""Ranking metrics: agreement of a model's scores with the rewards of each prompt's candidates.

>>> from fastrank import metrics
>>> scores = [[-0.9, -1.4, -1.1], [-2.0, -1.0]]
>>> rewards = [[3.0, 1.0, 2.0], [1.0, 0.0]]
>>> metrics.pairwise_accuracy(scores, rewards)      # 3 of 3 pairs right, 0 of 1: mean over prompts
0.5
>>> metrics.top1_accuracy(scores, rewards)
0.5

Every function takes the groups as a sequence (one tensor, array or list per group), or as flat
arrays with their offsets (``cu_groups``), and returns one float: the mean over the groups that have
a strict reward pair. A group with one candidate, or with all rewards equal, says nothing about
ranking and is left out; if no group is left, the result is NaN, because 0 would read as
"all wrong".

Ties in the scores are resolved by expectation over a random order, not by position: data sets are
often stored best first, and a model that gives every candidate the same score must not look perfect
there. (Many evaluation scripts sort stably instead.)

Groups of similar size are padded to a common width and compared as [G, n, n] blocks in float64: a
Python loop over groups could take longer than a training step.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["kendall_tau", "mrr", "ndcg", "pairwise_accuracy", "ranking_metrics", "top1_accuracy"]

_BLOCK_ELEMENTS = 1 << 22  # 32 MiB of float64 per comparison block


class _Block(NamedTuple):
    """Groups padded to the same width. Legend: G groups, n candidates."""

    scores: Tensor  # float64 [G, n], -inf where padded
    rewards: Tensor  # float64 [G, n], -inf where padded
    where: Tensor  # bool [G, n]


Ragged = Sequence[Any] | Tensor
_PerGroup = Callable[[_Block], Tensor]  # block -> float64 [G]


def pairwise_accuracy(scores: Ragged, rewards: Ragged, *, cu_groups: Any = None) -> float:
    """Share of the pairs with different rewards that the scores order the same way.

    Args:
        scores: one array of n_g scores for each group, or [C] with ``cu_groups``.
        rewards: the same shapes; higher is better.
        cu_groups: offsets [G+1] into flat ``scores`` and ``rewards``.

    Returns:
        The mean over groups of (pairs ordered right + ½ pairs with tied scores) / pairs, in [0, 1].

    Raises:
        ValueError: lengths or offsets disagree, a reward is not finite, or a score is NaN or +inf;
            a score of -inf, of a response that the model rules out, is below every other.
    """
    return _mean(_pairwise_accuracy, scores, rewards, cu_groups)


def kendall_tau(scores: Ragged, rewards: Ragged, *, cu_groups: Any = None) -> float:
    """Kendall's τ-b between scores and rewards, in [-1, 1].

    τ_b = (concordant − discordant) / √(pairs untied in scores · pairs untied in rewards)
    (Kendall, 1945). A group whose scores are all equal counts 0. Arguments as `pairwise_accuracy`.
    """
    return _mean(_kendall_tau, scores, rewards, cu_groups)


def ndcg(scores: Ragged, rewards: Ragged, *, k: int | None = None, cu_groups: Any = None) -> float:
    """Normalised discounted cumulative gain with linear gain r − min r, in [0, 1].

    DCG = Σ_position gain / log2(1 + position), divided by that of the ideal order; candidates
    with tied scores share the mean of their discounts (McSherry and Najork, 2008). ``k`` cuts
    after the first k positions. Other arguments as `pairwise_accuracy`.
    """
    if k is not None and k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    return _mean(lambda block: _ndcg(block, k), scores, rewards, cu_groups)


def mrr(scores: Ragged, rewards: Ragged, *, cu_groups: Any = None) -> float:
    """Mean reciprocal rank of the best candidate (of the first of several best), in (0, 1].

    Arguments as `pairwise_accuracy`.
    """
    return _mean(_reciprocal_rank, scores, rewards, cu_groups)


def top1_accuracy(scores: Ragged, rewards: Ragged, *, cu_groups: Any = None) -> float:
    """Share of groups whose highest score belongs to a candidate with the highest reward.

    Several highest scores count by the share of best ones among them. Arguments as
    `pairwise_accuracy`.
    """
    return _mean(_top1, scores, rewards, cu_groups)


def ranking_metrics(scores: Ragged, rewards: Ragged, *, cu_groups: Any = None) -> dict[str, float]:
    """All five metrics, keyed by function name, in one pass over the groups."""
    functions: dict[str, _PerGroup] = {
        "pairwise_accuracy": _pairwise_accuracy,
        "kendall_tau": _kendall_tau,
        "ndcg": lambda block: _ndcg(block, None),
        "mrr": _reciprocal_rank,
        "top1_accuracy": _top1,
    }
    return _means(functions, scores, rewards, cu_groups)


def _mean(function: _PerGroup, scores: Ragged, rewards: Ragged, cu_groups: Any) -> float:
    return _means({"": function}, scores, rewards, cu_groups)[""]


def _means(
    functions: dict[str, _PerGroup], scores: Ragged, rewards: Ragged, cu_groups: Any
) -> dict[str, float]:
    sums = dict.fromkeys(functions, 0.0)
    count = 0
    for block in _blocks(*_to_groups(scores, rewards, cu_groups)):
        count += block.scores.shape[0]
        for name, function in functions.items():
            sums[name] += float(function(block).sum())
    return {name: total / count if count else math.nan for name, total in sums.items()}


def _pairs(values: Tensor, where: Tensor) -> Tensor:
    """sign(v_i − v_j) for real candidates i, j: float64 [G, n, n]; 0 on padding."""
    greater = (values[:, :, None] > values[:, None, :]).double()
    both = where[:, :, None] & where[:, None, :]
    return (greater - greater.transpose(1, 2)) * both


def _pairwise_accuracy(block: _Block) -> Tensor:
    by_reward = _pairs(block.rewards, block.where).clamp_min(0)
    by_score = _pairs(block.scores, block.where)
    return (by_reward * (by_score + 1) / 2).sum((1, 2)) / by_reward.sum((1, 2))


def _kendall_tau(block: _Block) -> Tensor:
    by_reward, by_score = _pairs(block.rewards, block.where), _pairs(block.scores, block.where)
    agreement = (by_reward * by_score).sum((1, 2))
    untied = by_reward.abs().sum((1, 2)) * by_score.abs().sum((1, 2))
    return agreement / untied.clamp_min(1).sqrt()  # untied == 0 only where agreement is 0


def _ndcg(block: _Block, k: int | None) -> Tensor:
    worst = block.rewards.masked_fill(~block.where, math.inf).amin(1, keepdim=True)
    gain = (block.rewards - worst).masked_fill(~block.where, 0.0)
    positions = torch.arange(1, gain.shape[1] + 1, dtype=torch.float64)
    discount = 1 / torch.log2(1 + positions)
    if k is not None:
        discount = discount.masked_fill(positions > k, 0.0)
    cumulative = torch.cat((torch.zeros(1, dtype=torch.float64), discount.cumsum(0)))
    # A candidate with `above` better and `tied` equal scores (itself included) has the mean
    # discount of positions above+1 … above+tied.
    both = block.where[:, :, None] & block.where[:, None, :]
    above = ((block.scores[:, None, :] > block.scores[:, :, None]) & both).sum(2)
    tied = ((block.scores[:, None, :] == block.scores[:, :, None]) & both).sum(2)
    shared = (cumulative[above + tied] - cumulative[above]) / tied.clamp_min(1)
    ideal = (gain.sort(dim=1, descending=True).values * discount).sum(1)
    return (gain * shared).sum(1) / ideal


def _best(block: _Block) -> Tensor:
    return (block.rewards == block.rewards.amax(1, keepdim=True)) & block.where


def _reciprocal_rank(block: _Block) -> Tensor:
    best = _best(block)
    highest = block.scores.masked_fill(~best, -math.inf).amax(1, keepdim=True)
    above = ((block.scores > highest) & block.where).sum(1)
    level = (block.scores == highest) & block.where
    tied, tied_best = level.sum(1), (level & best).sum(1)
    result = 1.0 / (above + 1).double()
    for group in (tied > tied_best).nonzero().flatten().tolist():
        result[group] = _expected_reciprocal(
            int(above[group]), int(tied[group]), int(tied_best[group])
        )
    return result


def _expected_reciprocal(above: int, tied: int, best: int) -> float:
    """E[1/rank] of the first of ``best`` items among ``tied`` in random order, behind ``above``."""
    orders = math.comb(tied, best)
    return sum(
        math.comb(tied - 1 - offset, best - 1) / orders / (above + 1 + offset)
        for offset in range(tied - best + 1)
    )


def _top1(block: _Block) -> Tensor:
    top = (block.scores == block.scores.amax(1, keepdim=True)) & block.where
    return (top & _best(block)).sum(1).double() / top.sum(1)


def _to_groups(
    scores: Ragged, rewards: Ragged, cu_groups: Any
) -> tuple[list[Tensor], list[Tensor]]:
    if cu_groups is None:
        if len(scores) != len(rewards):
            raise ValueError(
                f"scores and rewards must hold equally many groups, "
                f"got {len(scores)} and {len(rewards)}"
            )
        return [_scores(s) for s in scores], [_rewards(r) for r in rewards]
    flat_scores, flat_rewards = _scores(scores), _rewards(rewards)
    offsets = [int(offset) for offset in cu_groups]
    if not offsets or offsets[0] != 0 or any(b < a for a, b in itertools.pairwise(offsets)):
        raise ValueError(f"cu_groups must start at 0 and never fall, got {offsets[:8]}")
    for name, flat in (("scores", flat_scores), ("rewards", flat_rewards)):
        if offsets[-1] != flat.numel():
            raise ValueError(
                f"cu_groups must end at {flat.numel()} (number of {name}), got {offsets[-1]}"
            )
    sizes = [b - a for a, b in itertools.pairwise(offsets)]
    return list(flat_scores.split(sizes)), list(flat_rewards.split(sizes))


def _scores(values: Any) -> Tensor:
    tensor = _vector(values, "scores")
    if not bool((tensor < math.inf).all()):  # not so for NaN either
        raise ValueError(f"scores must be below inf, got {tensor[~(tensor < math.inf)][0].item()}")
    return tensor


def _rewards(values: Any) -> Tensor:
    tensor = _vector(values, "rewards")
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"rewards must be finite, got {tensor[~tensor.isfinite()][0].item()}")
    return tensor


def _vector(values: Any, name: str) -> Tensor:
    tensor = torch.as_tensor(values).detach().to("cpu", torch.float64)
    if tensor.ndim != 1:
        raise ValueError(f"{name} must be one-dimensional for each group, got {tensor.ndim} axes")
    return tensor


def _blocks(scores: list[Tensor], rewards: list[Tensor]) -> Iterator[_Block]:
    """Groups with a strict reward pair, sorted by size so that little is padded."""
    kept: list[tuple[Tensor, Tensor]] = []
    for index, (score, reward) in enumerate(zip(scores, rewards, strict=True)):
        if score.numel() != reward.numel():
            raise ValueError(
                f"group {index} must have as many scores as rewards, "
                f"got {score.numel()} and {reward.numel()}"
            )
        if reward.numel() > 1 and bool(reward.min() < reward.max()):
            kept.append((score, reward))
    kept.sort(key=lambda pair: pair[0].numel())
    while kept:
        width = kept[-1][0].numel()
        size = max(1, _BLOCK_ELEMENTS // (width * width))
        # Only groups of at least half the width join: at most a quarter of a comparison is padding.
        start = max(0, len(kept) - size)
        while kept[start][0].numel() * 2 < width:
            start += 1
        yield _pad(kept[start:], width)
        del kept[start:]


def _pad(pairs: list[tuple[Tensor, Tensor]], width: int) -> _Block:
    pad = torch.nn.utils.rnn.pad_sequence
    scores = pad([s for s, _ in pairs], batch_first=True, padding_value=-math.inf)
    rewards = pad([r for _, r in pairs], batch_first=True, padding_value=-math.inf)
    lengths = torch.tensor([s.numel() for s, _ in pairs])
    return _Block(scores, rewards, torch.arange(width)[None, :] < lengths[:, None])
