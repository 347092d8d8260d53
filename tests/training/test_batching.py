"""Cutting a step: every group once, equally many packs, nothing that depends on the processes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fastrank.data.columns import GroupSizes, group_sizes
from fastrank.data.group import Group
from fastrank.modeling.cost import PackCost
from fastrank.tasks.menu import tiny_llama
from fastrank.training.batching import (
    PackDataset,
    StepCutter,
    StepDataset,
    StepSampler,
    plan_step,
)

SHARED = pytest.mark.parametrize("shared_prompts", [True, False])


class _Counted(Sequence[Group]):
    """Groups that note which of them are read, behind a hundred that none may read."""

    def __init__(self, groups: list[Group]) -> None:
        self.groups = groups
        self.read: list[int] = []
        own = group_sizes(groups)
        self.sizes = own.take([0] * 100 + list(range(len(groups))))
        self.index = list(range(100, 100 + len(groups)))

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, item: Any) -> Any:
        self.read.append(item)
        return self.groups[item - 100]


@SHARED
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("max_tokens", [75, 120, 100_000])
def test_every_group_is_computed_once_by_one_process(
    ragged_groups: list[Group], shared_prompts: bool, world_size: int, max_tokens: int
) -> None:
    groups = _Counted(ragged_groups)
    batches = []
    for rank in range(world_size):
        cutter = StepCutter(max_tokens, shared_prompts, rank, world_size)
        batches.append(StepDataset(groups, cutter).__getitems__(groups.index))
    # Each process read its own groups and no other, once.
    assert sorted(groups.read) == groups.index
    assert len({len(batch.packs) for batch in batches}) == 1
    seen = []
    for batch in batches:
        assert batch.num_groups == len(ragged_groups)
        assert batch.index == tuple(range(100, 100 + len(ragged_groups)))
        for pack, weight in zip(batch.packs, batch.weights, strict=True):
            assert pack.num_tokens <= max_tokens
            assert weight in (0.0, 1.0)
            if weight:
                seen += pack.group_index
                for position, name in zip(pack.group_index, pack.names, strict=True):
                    assert name == ragged_groups[position].name
            else:
                assert pack.num_tokens == 2
    assert sorted(seen) == list(range(len(ragged_groups)))


def test_packs_are_few_and_even(ragged_groups: list[Group]) -> None:
    total = sum(group.num_tokens_shared for group in ragged_groups)
    for world_size in (1, 2, 4):
        plan = plan_step(ragged_groups, world_size, max_tokens=total, shared_prompts=True)
        loads = [sum(ragged_groups[i].num_tokens_shared for i in members) for members in plan]
        assert len(plan) == world_size  # one round
        assert max(loads) - min(loads) <= max(g.num_tokens_shared for g in ragged_groups)
        assert loads == sorted(loads, reverse=True)


def test_processes_of_many_rounds_have_even_loads_and_no_round_waits(
    ragged_groups: list[Group],
) -> None:
    """Also by process over all rounds, for engines that wait in the last pack only."""
    cost = PackCost(1.0, 2.0, 5.0)
    groups = ragged_groups * 20
    costs = cost.of_groups(group_sizes(groups), True)
    plan = plan_step(groups, 4, max_tokens=300, shared_prompts=True, cost=cost)
    loads = np.array([costs[members].sum() for members in plan]).reshape(-1, 4)
    assert len(loads) > 3
    assert (loads.max(1) / loads.mean(1)).max() < 1.05
    assert loads.sum(0).max() / loads.sum(0).mean() < 1.01


@pytest.mark.parametrize("max_tokens", [4096, 16384])
def test_little_idles_at_512_processes_with_four_groups_each(max_tokens: int) -> None:
    """Three candidates to a prompt, with the quantiles of OpenAssistant's lengths; the cost of a 1B
    Llama with a vocabulary of 128K. No group may cost more than the mean load of a process."""
    rng = np.random.default_rng(max_tokens)
    quantiles = [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 1]
    prompts, total = (
        np.interp(rng.random(2200), quantiles, known).astype(np.int64)
        for known in (
            [8, 13, 21, 28, 51, 85, 131, 206, 288, 496, 642, 1009, 1186],
            [9, 108, 192, 270, 340, 439, 533, 698, 926, 1284, 1585, 1783, 2477],
        )
    )
    shares = rng.dirichlet([3.0] * 3, 2200)
    responses = np.maximum(1, shares * total[:, None]).astype(np.int64).ravel()
    sizes = GroupSizes.of_lengths(prompts, responses, np.full(2200, 3))
    sizes = sizes.take(np.flatnonzero(sizes.num_tokens <= 2748)[:2048])
    groups: Any = SimpleNamespace(sizes=sizes)
    cost = PackCost(2 * 0.973e9, 4 * 16 * 2048, 2 * 2048 * 128256)

    def idle(cost: PackCost | None) -> float:
        plan = plan_step(groups, 512, max_tokens=max_tokens, shared_prompts=True, cost=cost)
        loads = np.array([costs[members].sum() for members in plan]).reshape(-1, 512)
        return 1 - loads.sum() / 512 / loads.max(1).sum()

    costs = cost.of_groups(sizes, True)
    assert idle(cost) < 0.03 < idle(None)  # by tokens more


def test_no_more_rounds_than_best_fit_needs() -> None:
    """7, 7, 6, 6, 4 into 10s and 3s: an even spread alone would need another pack."""
    groups = [Group([1], [[1] * (size - 1)], [0.0]) for size in (6, 6, 5, 5, 5, 3)]
    plan = plan_step(groups, 1, max_tokens=15, shared_prompts=True)
    assert len(plan) == 2
    assert sorted(itertools.chain.from_iterable(plan)) == list(range(6))


@SHARED
def test_a_group_larger_than_a_pack_is_named(shared_prompts: bool) -> None:
    groups = [Group([1], [[1]], [0.0]), Group([1, 2], [[1] * 9, [2] * 9], [0.0, 1.0], name="x:7")]
    with pytest.raises(ValueError, match=r"x:7: must fit into max_tokens=15, got \d+ tokens"):
        plan_step(groups, 2, max_tokens=15, shared_prompts=shared_prompts)


def test_more_processes_than_groups_get_fillers(ragged_groups: list[Group]) -> None:
    few = ragged_groups[:2]
    batches = [StepCutter(1000, True, rank, 4)(few, range(2)) for rank in range(4)]
    assert [batch.weights for batch in batches] == [[1.0], [1.0], [0.0], [0.0]]
    assert [batch.packs[0].num_tokens for batch in batches[2:]] == [2] * 2
    assert batches[2].num_tokens == 0


def test_steps_of_an_epoch_hold_every_group_once_and_depend_on_seed_and_epoch() -> None:
    def steps(seed: int, epoch: int, **options: bool) -> list[list[int]]:
        sampler = StepSampler(23, 5, seed=seed, **options)
        sampler.set_epoch(epoch)
        assert len(list(sampler)) == len(sampler)
        return list(sampler)

    first = steps(1, 0)
    assert [len(step) for step in first] == [5, 5, 5, 5, 3]
    assert sorted(itertools.chain.from_iterable(first)) == list(range(23))
    assert first == steps(1, 0)
    assert first != steps(1, 1)
    assert first != steps(2, 0)
    assert steps(0, 1) != steps(1, 0)  # seed and epoch are not simply added
    assert [len(step) for step in steps(1, 0, drop_last=True)] == [5, 5, 5, 5]


@SHARED
def test_an_evaluation_holds_every_group_once(
    ragged_groups: list[Group], shared_prompts: bool
) -> None:
    seen = []
    for rank in range(3):
        dataset = PackDataset(ragged_groups, StepCutter(80, shared_prompts, rank, 3))
        for number in range(len(dataset)):
            batch = dataset[number]
            if not batch.weights[0]:
                continue
            seen += batch.packs[0].group_index
            assert torch.equal(
                batch.packs[0].rewards[
                    : ragged_groups[batch.packs[0].group_index[0]].num_candidates
                ],
                ragged_groups[batch.packs[0].group_index[0]].rewards,
            )
    assert sorted(seen) == list(range(len(ragged_groups)))


def test_the_cost_of_a_model_is_what_its_products_take() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny_llama(0)
    model.set_attn_implementation("eager")  # whose products hold every pair, the masked ones too
    length = 16
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.zeros((1, length), dtype=torch.int64))
    # The weights of norms are no product, but too few to be left out.
    norms = sum(weight.numel() for name, weight in model.named_parameters() if "norm" in name)
    cost = PackCost.of_model(model)
    expected = cost.per_token * length + cost.per_pair * length**2 + cost.per_label * length
    assert counter.get_total_flops() + 2 * norms * length == expected


def test_pairs_are_those_of_the_mask(ragged_groups: list[Group]) -> None:
    sizes = group_sizes(ragged_groups)
    for group, pairs in zip(ragged_groups, sizes.num_pairs.tolist(), strict=True):
        prompt = len(group.prompt_ids)
        whole = torch.ones(prompt, prompt).tril().sum()
        for ids in group.response_ids:
            whole += prompt * len(ids) + torch.ones(len(ids), len(ids)).tril().sum()
        assert pairs == int(whole)
