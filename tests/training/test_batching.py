"""Cutting a step: every group once, equally many packs, nothing that depends on the processes."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastrank.data.group import Group
from fastrank.training.batching import (
    PackDataset,
    StepCutter,
    StepSampler,
    plan_step,
)

SHARED = pytest.mark.parametrize("shared_prompts", [True, False])


def _numbered(groups: list[Group]) -> list[tuple[int, Group]]:
    return [(100 + i, group) for i, group in enumerate(groups)]


@SHARED
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("max_tokens", [75, 120, 100_000])
def test_every_group_is_computed_once_by_one_process(
    ragged_groups: list[Group], shared_prompts: bool, world_size: int, max_tokens: int
) -> None:
    batches = [
        StepCutter(max_tokens, shared_prompts, rank, world_size)(_numbered(ragged_groups))
        for rank in range(world_size)
    ]
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
                assert pack.num_groups == 1
    assert sorted(seen) == list(range(len(ragged_groups)))


def test_packs_are_few_and_even(ragged_groups: list[Group]) -> None:
    total = sum(group.num_tokens_shared for group in ragged_groups)
    for world_size in (1, 2, 4):
        plan = plan_step(ragged_groups, world_size, max_tokens=total, shared_prompts=True)
        loads = [sum(ragged_groups[i].num_tokens_shared for i in members) for members in plan]
        assert len(plan) == world_size  # one round
        assert max(loads) - min(loads) <= max(g.num_tokens_shared for g in ragged_groups)
        assert loads == sorted(loads, reverse=True)


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
    batches = [StepCutter(1000, True, rank, 4)(_numbered(few)) for rank in range(4)]
    assert [batch.weights for batch in batches] == [[1.0], [1.0], [0.0], [0.0]]
    smallest = min(group.num_tokens_shared for group in few)
    assert [batch.packs[0].num_tokens for batch in batches[2:]] == [smallest] * 2
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
            seen += batch.packs[0].group_index if batch.weights[0] else ()
            assert torch.equal(
                batch.packs[0].rewards[
                    : ragged_groups[batch.packs[0].group_index[0]].num_candidates
                ],
                ragged_groups[batch.packs[0].group_index[0]].rewards,
            )
    assert sorted(seen) == list(range(len(ragged_groups)))
