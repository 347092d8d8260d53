"""Groups whose candidates are shared out among processes, where one costs more than a mean share.

With few prompts per process the costliest one decides how long a step takes, however whole groups
are dealt. Its candidates can be computed apart from each other, each part with the prompt: the loss
needs them together only for their scores. So the processes exchange the log-probabilities of the
response tokens of such groups, four bytes each. Every one then knows the whole loss of its groups,
to the same bits, and back-propagates its own candidates' part of it. One sum per candidate would
be less to send, but whether two scores are equal would depend on who added them up.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastrank.data.bins import spread_evenly
from fastrank.data.columns import GroupSizes
from fastrank.data.packing import Group
from fastrank.modeling.cost import PackCost

Deal = dict[int, tuple[int, ...]]
"""A process's part of a step: the candidates that it computes, by the position of their group."""

#: Parts cost at most so many mean loads of a process, where no candidate alone costs more.
_SHARES = (1.0, 0.75, 0.5, 0.35)
#: A cut is worth it if it makes the costliest process cheaper by this factor.
_GAIN = 0.97


@dataclass(frozen=True)
class CandidateShare:
    """This process's share of the C candidates, with T ranked tokens, of its groups.

    Attributes:
        own: bool [C], whether this process computes the candidate.
        num_reported: groups of which this process reports loss and scores, the first ones; other
            processes report the rest.
        tokens: int64, places among the T of the ranked tokens of groups that are shared.
        slots: int64, the places of the same tokens in what is exchanged.
        num_exchanged: ranked tokens of all groups of the step that are shared.
        num_elsewhere: response tokens, context included, that other processes compute.
    """

    own: Tensor
    num_reported: int
    tokens: Tensor
    slots: Tensor
    num_exchanged: int
    num_elsewhere: int

    @classmethod
    def of(
        cls,
        deals: Sequence[Deal],
        rank: int,
        sizes: GroupSizes,
        members: Sequence[int],
        groups: Sequence[Group],
    ) -> CandidateShare:
        """
        Args:
            deals: of every process.
            rank: of this process.
            sizes: of the step's groups.
            members: positions of this process's groups, in the order of `own_groups`.
            groups: these groups.
        """
        takers = _takers(deals)
        shared = sorted(position for position, ranks in takers.items() if len(ranks) > 1)
        labels = sizes.num_labels[shared]
        begins = dict(zip(shared, (np.cumsum(labels) - labels).tolist(), strict=True))
        own: list[bool] = []
        tokens: list[int] = []
        slots: list[int] = []
        place = elsewhere = 0
        for position, group in zip(members, groups, strict=True):
            lengths = [len(ids) for ids in group.response_ids]
            others = [i not in deals[rank][position] for i in range(len(lengths))]
            own += [not other for other in others]
            elsewhere += sum(itertools.compress(lengths, others))
            count = sum(group.label_counts)
            if position in begins:
                tokens += range(place, place + count)
                slots += range(begins[position], begins[position] + count)
            place += count
        return cls(
            own=torch.tensor(own, dtype=torch.bool),
            num_reported=sum(takers[position][0] == rank for position in members),
            tokens=torch.tensor(tokens, dtype=torch.int64),
            slots=torch.tensor(slots, dtype=torch.int64),
            num_exchanged=int(labels.sum()),
            num_elsewhere=elsewhere,
        )

    def exchange(self, token_logprobs: Tensor, add_up: Callable[[Tensor], None]) -> None:
        """Fill in what other processes computed, in place; every process must call it.

        Args:
            token_logprobs: [T], 0 where another process computes the candidate.
            add_up: adds up every process's tensor, in place.
        """
        tokens, slots = (index.to(token_logprobs.device) for index in (self.tokens, self.slots))
        everyone = token_logprobs.new_zeros(self.num_exchanged)
        everyone[slots] = token_logprobs[tokens]
        add_up(everyone)  # 0 from all processes but one: exact
        token_logprobs[tokens] = everyone[slots]


def own_groups(deals: Sequence[Deal], rank: int) -> list[int]:
    """Positions of the groups that a process has candidates of: first those that it reports."""
    takers = _takers(deals)
    return sorted(deals[rank], key=lambda position: (takers[position][0] != rank, position))


def _takers(deals: Sequence[Deal]) -> dict[int, list[int]]:
    """The processes that have candidates of each group; the first one reports it."""
    takers: dict[int, list[int]] = {}
    for rank, deal in enumerate(deals):
        for position in deal:
            takers.setdefault(position, []).append(rank)
    return takers


def deal_candidates(
    sizes: GroupSizes,
    lengths_of: Callable[[int], NDArray[np.int64]],
    world_size: int,
    *,
    cost: PackCost,
    shared_prompts: bool,
    max_tokens: int | None,
    costliest: float,
) -> list[Deal] | None:
    """Parts of groups for every process, the costliest of which costs less than ``costliest``; None
    where that is no gain. Depends on sizes alone, so every process comes to the same deals.

    Args:
        sizes: of the step's groups.
        lengths_of: gives the tokens of each response of a group; asked for large ones only.
        world_size: processes that take different data.
        cost: of a group or a part of one.
        shared_prompts: whether a prompt is encoded once for all its candidates of a process.
        max_tokens: of the one pack of every process; None for any number of packs.
        costliest: cost of the costliest process if whole groups are dealt.
    """
    costs = cost.of_groups(sizes, shared_prompts)
    mean = float(costs.sum()) / world_size
    ranked = sizes.num_labels / (sizes.num_tokens - sizes.num_prompt_tokens)
    large = {
        i: _Candidates.of(
            int(sizes.num_prompt_tokens[i]), lengths_of(i), ranked[i], cost, shared_prompts
        )
        for i in np.flatnonzero((costs > _SHARES[-1] * mean) & (sizes.num_candidates > 1)).tolist()
    }
    # No process is cheaper than the costliest candidate.
    floor = max((float(own.alone.max()) for own in large.values()), default=0.0)
    best = None
    for most in dict.fromkeys(max(share * mean, floor) for share in _SHARES):
        cut = {i: own.cut(most, world_size) for i, own in large.items() if costs[i] > most}
        parts = [(i, part) for i, of_group in cut.items() for part in of_group]
        if not parts:
            continue
        whole = [i for i in range(len(sizes)) if i not in cut]
        pieces = sizes.take(whole).joined(
            GroupSizes.of_lengths(
                sizes.num_prompt_tokens[[i for i, _ in parts]],
                np.concatenate([large[i].lengths[part] for i, part in parts]),
                np.array([len(part) for _, part in parts]),
                np.array([large[i].labels[part].sum() for i, part in parts]),
            )
        )
        piece_costs = cost.of_groups(pieces, shared_prompts)
        bins = _spread(pieces, piece_costs, world_size, shared_prompts, max_tokens)
        if bins is None:
            continue
        load = max(float(piece_costs[members].sum()) for members in bins)
        if load < _GAIN * costliest:
            named = [*((i, range(int(sizes.num_candidates[i]))) for i in whole), *parts]
            best, costliest = [_deal([named[k] for k in members]) for members in bins], load
    return best


def _spread(
    pieces: GroupSizes,
    costs: NDArray[np.float64],
    world_size: int,
    shared_prompts: bool,
    max_tokens: int | None,
) -> list[list[int]] | None:
    """The pieces of every process; None if they do not fit into a pack each."""
    if max_tokens is None or not shared_prompts:
        bins = spread_evenly(costs, world_size, np.zeros_like(pieces.num_tokens), 0)
    else:
        bins = spread_evenly(costs, world_size, pieces.num_tokens, max_tokens)
    if bins is None or max_tokens is None:
        return bins
    packs = (pieces.take(members) for members in filter(None, bins))
    if not shared_prompts and any(
        p.num_candidates.sum() * p.longest_sequence.max() > max_tokens for p in packs
    ):
        return None
    return bins


def _deal(pieces: Sequence[tuple[int, Sequence[int]]]) -> Deal:
    """Parts of one group are put together."""
    deal: dict[int, list[int]] = {}
    for position, members in pieces:
        deal.setdefault(position, []).extend(members)
    return {position: tuple(sorted(members)) for position, members in deal.items()}


@dataclass(frozen=True)
class _Candidates:
    """A group that may be cut: n candidates.

    Attributes:
        lengths: [n] response tokens.
        labels: [n] ranked ones among them, about.
        alone: [n] cost of each with the prompt.
        prompt: cost of the prompt, which every part pays.
    """

    lengths: NDArray[np.int64]
    labels: NDArray[np.int64]
    alone: NDArray[np.float64]
    prompt: float

    @classmethod
    def of(
        cls,
        prompt: int,
        lengths: NDArray[np.int64],
        ranked: float,
        cost: PackCost,
        shared_prompts: bool,
    ) -> _Candidates:
        """``ranked``: the share of ranked tokens in the responses of the group."""

        def costs(lengths: NDArray[np.int64], labels: NDArray[np.int64]) -> NDArray[np.float64]:
            one = np.ones_like(lengths)
            sizes = GroupSizes.of_lengths(prompt * one, lengths, one, labels)
            return cost.of_groups(sizes, shared_prompts)

        none = np.array([0])
        shared = float(costs(none, none)[0]) if shared_prompts else 0.0
        labels = (lengths * ranked).round().astype(np.int64)
        return cls(lengths, labels, costs(lengths, labels), shared)

    def cut(self, most: float, max_parts: int) -> list[list[int]]:
        """As few parts as it takes for none to cost more than ``most``, and at most so many."""
        own = self.alone - self.prompt
        parts: list[list[int]] = []
        last = min(len(own), max_parts)
        for number in range(min(math.ceil(float(own.sum()) / most), last), last + 1):
            parts = spread_evenly(own, number, np.zeros_like(self.lengths), 0) or []
            if max(float(own[part].sum()) for part in parts) + self.prompt <= most:
                break
        return list(filter(None, parts))
