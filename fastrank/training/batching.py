"""From the groups of a step to the packs of every process.

A step is a set of groups, drawn from a seeded permutation, and nothing else: the number of
processes and the size of packs only decide how that set is cut. Because the loss is a sum over
groups divided by the number of groups of the step, every cut gives the same gradient.

transformers' usual way, a loader of micro-batches sharded by accelerate, fixes the number of
micro-batches instead, pads or repeats samples at an uneven end, and weighs a short micro-batch
like a full one. Here the loader yields one `StepBatch` per step, and the processes get equally
many packs: engines that communicate inside forward and backward would otherwise wait for each
other for ever. Where packs are missing, a process computes one of two tokens with weight 0.

Every process plans the whole step, from the sizes of its groups alone, and reads its own groups.
Packs are dealt by what they cost (`fastrank.modeling.cost`): processes wait for the slowest. Where
a group costs more than a process's share of the step, its candidates may be shared out
(`fastrank.training.splitting`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import BatchSampler, DataLoader, Dataset

from fastrank.data.bins import best_fit, even_out, fill_padded, spread_evenly
from fastrank.data.candidate_packs import filler_pack
from fastrank.data.columns import GroupSizes, GroupView, group_sizes, response_lengths
from fastrank.data.packing import Group, Pack, pack
from fastrank.data.streamed_groups import StreamedGroups
from fastrank.modeling.cost import PackCost
from fastrank.training.splitting import CandidateShare, Deal, deal_candidates, own_groups

# Whole groups are dealt where the costliest process costs at most so many mean loads.
_EVEN = 1.05
# Packs that two-phase training and its evaluation make at a time, at most.
_PACKS_AT_ONCE = 64


@dataclass(frozen=True)
class StepBatch:
    """One process's part of a step.

    Attributes:
        packs: this process's packs; equally many on every process.
        weights: 1.0 for each pack, or 0.0 for one that only keeps the processes in step.
        num_groups: groups of the whole step, over all processes.
        index: positions in the training set of all the step's groups; ``Pack.group_index`` of
            ``packs`` are positions in it.
        members: positions in ``index`` of this process's groups.
        groups: those groups, where their candidates are packed later: in two phases, or because
            some are shared with other processes. ``packs`` is empty then, and this process may have
            no group at all.
        share: which of their candidates this process computes; None for all.
    """

    packs: list[Pack]
    weights: list[float]
    num_groups: int
    index: tuple[int, ...]
    members: tuple[int, ...] = ()
    groups: tuple[Group, ...] = ()
    share: CandidateShare | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that this process computes for the step, fillers not counted."""
        packed = sum(
            p.num_tokens for p, weight in zip(self.packs, self.weights, strict=True) if weight
        )
        elsewhere = 0 if self.share is None else self.share.num_elsewhere
        return packed + sum(group.num_tokens_shared for group in self.groups) - elsewhere

    def pin_memory(self) -> StepBatch:
        return replace(self, packs=[pack.pin_memory() for pack in self.packs])


class StepSampler(BatchSampler):
    """The groups of each step of an epoch: a permutation that depends on seed and epoch alone.

    Args:
        num_groups: size of the training set.
        groups_per_step: the last step of an epoch may have fewer.
        seed: of the permutations.
        drop_last: leave out a last step that is not full.
        in_order: no permutation, for a stream.
    """

    def __init__(
        self,
        num_groups: int,
        groups_per_step: int,
        *,
        seed: int,
        drop_last: bool = False,
        in_order: bool = False,
    ) -> None:
        self.num_groups = num_groups
        self.groups_per_step = groups_per_step
        self.seed = seed
        self.drop_last = drop_last
        self.in_order = in_order
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        if self.drop_last:
            return self.num_groups // self.groups_per_step
        return math.ceil(self.num_groups / self.groups_per_step)

    def __iter__(self) -> Iterator[list[int]]:
        order: Any = range(self.num_groups)
        if not self.in_order:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(self.num_groups)
        for step in range(len(self)):
            start = step * self.groups_per_step
            yield np.asarray(order[start : start + self.groups_per_step]).tolist()


def loader_options(args: Any) -> dict[str, Any]:
    """Arguments of a ``DataLoader`` that a run's options ask for."""
    workers = args.dataloader_num_workers
    options: dict[str, Any] = {
        "num_workers": workers,
        "pin_memory": args.dataloader_pin_memory and args.device.type == "cuda",
    }
    if workers:
        options["persistent_workers"] = args.dataloader_persistent_workers
        options["prefetch_factor"] = args.dataloader_prefetch_factor
    return options


class StepLoader(DataLoader):
    """Loader of steps whose order follows the epoch that the training loop announces."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


class StepDataset(Dataset):
    """The training set, from which this process's part of a step is asked for at once."""

    def __init__(self, groups: Sequence[Group], cutter: StepCutter) -> None:
        self.groups = groups
        self.cutter = cutter
        # A stream's groups are read when they are trained on.
        self.sizes = None if isinstance(groups, StreamedGroups) else group_sizes(groups)

    def __len__(self) -> int:
        return len(self.groups)

    def __getitems__(self, index: Sequence[int]) -> StepBatch:
        return self.cutter(self.groups, index, self.sizes)


class _Chosen(GroupView):
    """The groups at some positions; one is read when it is asked for."""

    def __init__(
        self, groups: Sequence[Group], index: Sequence[int], sizes: GroupSizes | None
    ) -> None:
        self._groups = groups
        self._index = index
        self.sizes = group_sizes([groups[i] for i in index]) if sizes is None else sizes.take(index)

    def __len__(self) -> int:
        return len(self._index)

    def group_at(self, position: int) -> Group:
        return self._groups[self._index[position]]

    def response_lengths(self, position: int) -> NDArray[np.int64]:
        return response_lengths(self._groups, self._index[position])


@dataclass(frozen=True)
class StepCutter:
    """Cuts the groups of a step into this process's packs.

    With ``whole_groups`` it only deals out the groups, for training in two phases, which knows what
    to pack when the candidates have been scored. With ``split_groups`` processes share the
    candidates of groups that one of them would have to be waited for.
    """

    max_tokens: int
    shared_prompts: bool = True
    rank: int = 0
    world_size: int = 1
    whole_groups: bool = False
    cost: PackCost = PackCost()
    split_groups: bool = False

    def __call__(
        self, groups: Sequence[Group], index: Sequence[int], sizes: GroupSizes | None = None
    ) -> StepBatch:
        """This process's part of a step.

        Args:
            groups: the training set, of which only this process's groups are read.
            index: positions in it of the step's groups.
            sizes: of the whole training set; None to read the step's groups for them.
        """
        chosen = _Chosen(groups, index, sizes)
        plan = self._plan(chosen)
        deals = self._deals(chosen, plan)
        if deals is None:
            return self.batch(chosen, plan[self.rank :: self.world_size], tuple(index))
        members = own_groups(deals, self.rank)
        own = tuple(chosen[i] for i in members)
        share = CandidateShare.of(deals, self.rank, chosen.sizes, members, own)
        return StepBatch([], [], len(index), tuple(index), tuple(members), own, share)

    def _deals(self, groups: _Chosen, plan: Sequence[Sequence[int]]) -> list[Deal] | None:
        """The candidates of every process; None to deal whole groups by the plan."""
        if not self.split_groups or self.world_size == 1:
            return None
        if len(plan) > self.world_size and not self.whole_groups:
            return None  # what is split has to be in one pack, with the scores of all its parts
        costs = self.cost.of_groups(groups.sizes, self.shared_prompts)
        loads = [
            sum(float(costs[part].sum()) for part in plan[rank :: self.world_size] if len(part))
            for rank in range(self.world_size)
        ]
        if max(loads) <= _EVEN * sum(loads) / self.world_size:
            return None
        return deal_candidates(
            groups.sizes,
            groups.response_lengths,
            self.world_size,
            cost=self.cost,
            shared_prompts=self.shared_prompts,
            max_tokens=None if self.whole_groups else self.max_tokens,
            costliest=max(loads),
        )

    def batch(
        self, groups: Sequence[Group], plan: Sequence[Sequence[int]], index: tuple[int, ...]
    ) -> StepBatch:
        """This process's part of these groups, by its part of a `plan`."""
        members = tuple(i for part in plan for i in part)
        if self.whole_groups:
            own = tuple(groups[i] for i in members)
            return StepBatch([], [], len(groups), index, members, own)
        built = [self.build(groups, part) for part in plan]
        return StepBatch([p for p, _ in built], [w for _, w in built], len(groups), index, members)

    def plan(self, groups: Sequence[Group]) -> list[list[int]]:
        """The groups of each of this process's packs; an empty list stands for a filler.

        Whole groups come in parts of many packs' worth, equally many on every process.
        """
        return self._plan(groups)[self.rank :: self.world_size]

    def _plan(self, groups: Sequence[Group]) -> list[list[int]]:
        """The packs of all processes, as `plan_step` orders them."""
        budget = self.max_tokens
        if self.whole_groups:
            largest = int(group_sizes(groups).pack_tokens(self.shared_prompts).max())
            budget = max(_PACKS_AT_ONCE * self.max_tokens, largest)
        return plan_step(
            groups,
            self.world_size,
            max_tokens=budget,
            shared_prompts=self.shared_prompts,
            cost=self.cost,
        )

    def build(self, groups: Sequence[Group], members: Sequence[int]) -> tuple[Pack, float]:
        """The pack of these members and its weight: the smallest pack with weight 0 for none."""
        if not members:
            return filler_pack(self.shared_prompts).pack, 0.0
        (whole,) = pack(
            [groups[i] for i in members],
            max_tokens=self.max_tokens,
            shared_prompts=self.shared_prompts,
        )
        index = tuple(members[i] for i in whole.group_index)
        return whole.replace(group_index=index), 1.0


class PackDataset(Dataset):
    """One process's packs of an evaluation: a `StepBatch` of one pack each (or of a part of its
    whole groups), built when asked."""

    def __init__(self, groups: Sequence[Group], cutter: StepCutter) -> None:
        self.groups = groups
        self.cutter = cutter
        self.plan = cutter.plan(groups)

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, number: int) -> StepBatch:
        members = self.plan[number]
        return self.cutter.batch(self.groups, [members], tuple(members))


def plan_step(
    groups: Sequence[Group],
    world_size: int,
    *,
    max_tokens: int,
    shared_prompts: bool,
    cost: PackCost | None = None,
) -> list[list[int]]:
    """Which groups go into which pack: a multiple of ``world_size`` packs, for process 0, 1, …,
    0, 1, …

    As few rounds of packs as the budget allows, and their costs as equal as
    `fastrank.data.bins.spread_evenly` makes them, so that no process waits long for another. A pack
    may be empty. Depends on the sizes of the groups alone, so every process comes to the same plan.

    Args:
        groups: of the step.
        world_size: processes that take different data.
        max_tokens: of a pack.
        shared_prompts: whether a prompt is encoded once for all its candidates.
        cost: of a group; None for its tokens.

    Raises:
        ValueError: a group is larger than ``max_tokens``.
    """
    sizes = group_sizes(groups)
    tokens = sizes.pack_tokens(shared_prompts)
    for i in np.flatnonzero(tokens > max_tokens)[:1].tolist():
        raise ValueError(too_large(groups[i], int(tokens[i]), max_tokens))
    costs = (cost or PackCost()).of_groups(sizes, shared_prompts)
    if shared_prompts:
        fewest = best_fit(tokens.tolist(), max_tokens)
    else:
        shapes = zip(sizes.num_candidates.tolist(), sizes.longest_sequence.tolist(), strict=True)
        fewest = fill_padded(list(shapes), max_tokens)
    most_rounds = math.ceil(len(fewest) / world_size)
    fewest_rounds = math.ceil(int(tokens.sum()) / (max_tokens * world_size))
    tried = np.linspace(fewest_rounds, most_rounds, _ATTEMPTS).round().astype(int)
    for rounds in np.unique(tried).tolist():
        if shared_prompts:
            bins = spread_evenly(costs, rounds * world_size, tokens, max_tokens)
        else:
            bins = _spread_rows(sizes, costs, rounds * world_size, max_tokens)
        if bins is not None:
            break
    else:
        bins = fewest + [[] for _ in range(most_rounds * world_size - len(fewest))]
        if shared_prompts:
            even_out(bins, costs, tokens, max_tokens)
    # The packs of one round run side by side: let them be of like cost. Every second round goes
    # the other way, so that no process has the costliest of each.
    loads = [float(costs[members].sum()) for members in bins]
    order = sorted(range(len(bins)), key=lambda number: -loads[number])
    ordered = [bins[number] for number in order]
    for start in range(world_size, len(ordered), 2 * world_size):
        ordered[start : start + world_size] = reversed(ordered[start : start + world_size])
    return ordered


#: Numbers of rounds that are tried between the fewest that may do and those that certainly do.
_ATTEMPTS = 8


def _spread_rows(
    sizes: GroupSizes, costs: NDArray[np.float64], num_bins: int, max_tokens: int
) -> list[list[int]] | None:
    """Padding makes rows of like length cheap together: fill by length, in equal shares of cost.
    None if a pack is too large then."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    share = float(costs.sum()) / num_bins
    filled = 0.0
    for i in np.argsort(-sizes.longest_sequence, kind="stable").tolist():
        bins[min(int(filled / share), num_bins - 1)].append(i)
        filled += float(costs[i])
    for members in filter(None, bins):
        longest = sizes.longest_sequence[members].max()
        if sizes.num_candidates[members].sum() * longest > max_tokens:
            return None
    return bins


def too_large(group: Group, size: int, max_tokens: int) -> str:
    return (
        f"{group.name or 'a group'}: must fit into max_tokens={max_tokens}, got {size} tokens "
        f"({group.num_candidates} responses, prompt of {len(group.prompt_ids)}); raise max_tokens, "
        "lower max_response_length, max_prompt_length or max_candidates, or train with "
        "backprop=two_phase"
    )
