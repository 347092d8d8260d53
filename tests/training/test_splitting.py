"""Candidates of a large group shared out: the same gradients to rounding, and little that idles."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import candidate_shares as worker
import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from torchrun import filled_once

from fastrank.data.columns import GroupSizes, group_sizes, response_lengths
from fastrank.data.group import Group
from fastrank.modeling.cost import PackCost
from fastrank.training.batching import StepCutter, StepDataset, plan_step
from fastrank.training.engine import Engine
from fastrank.training.splitting import deal_candidates

WORK = {"backprop_fraction", "work_saved"}  # prompts that are encoded again count
COST = PackCost(3.0, 0.1, 5.0)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What every process computed, by case."""
    count = worker.PROCESSES

    def run_all(folder: Path) -> None:
        mp.start_processes(worker.run, (count, str(folder)), nprocs=count, start_method="fork")

    folder = filled_once(tmp_path_factory, "candidate_shares", run_all)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(count)]


@pytest.mark.parametrize("case", worker.CASES, ids=lambda case: "-".join(map(str, case)))
def test_processes_that_share_candidates_compute_what_one_does(
    found: Any, case: tuple[str, str, str, bool]
) -> None:
    everyone = [results[worker.CASES.index(case)] for results in found]
    for number, want in enumerate(worker.run_case(case, Engine())):
        steps = [results[number] for results in everyone]
        assert want["shared"] == 0 < max(step["shared"] for step in steps)
        assert (min(step["tokens"] for step in steps) == 0) == (number == 2)
        for step in steps:
            assert step["gradients"].keys() == want["gradients"].keys()
            for name, gradient in want["gradients"].items():
                assert gradient.dtype == torch.float64
                torch.testing.assert_close(
                    step["gradients"][name], gradient, rtol=1e-12, atol=1e-12, msg=name
                )
            assert step["values"].keys() == want["values"].keys()
            # Padding counts in packs of whole groups alone.
            padded = set() if case[3] else {"shared_prompt_ratio"}
            for name in want["values"].keys() - WORK - padded:
                assert step["values"][name] == pytest.approx(want["values"][name], rel=1e-12), name
        mean = sum(step["loss"] for step in steps) / len(steps)
        assert mean == pytest.approx(float(want["loss"]), rel=1e-6)  # added up in float32
        # Each group is reported once, with all of its scores.
        reported = [item for step in steps for item in step["scores"].items()]
        assert len(reported) == len(want["scores"])
        for position, scores in reported:
            torch.testing.assert_close(scores, want["scores"][position], rtol=1e-12, atol=1e-12)


class _Sizes(Sequence[Group]):
    """Groups that note which of them are read; their sizes can be known without."""

    def __init__(self, groups: list[Group]) -> None:
        self.groups = groups
        self.sizes = group_sizes(groups)
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, item: Any) -> Any:
        self.read.append(item)
        return self.groups[item]

    def response_lengths(self, position: int) -> Any:
        return response_lengths(self.groups, position)


@pytest.mark.parametrize("shared_prompts", [True, False])
@pytest.mark.parametrize("two_phase", [True, False])
def test_every_candidate_is_computed_once_and_known_where_its_group_is(
    two_phase: bool, shared_prompts: bool
) -> None:
    plain = worker.make_groups()
    for world_size in (2, 3, 8):
        groups, computed, reported = _Sizes(plain), defaultdict(list), []
        batches, everyone = [], []
        for rank in range(world_size):
            cutter = StepCutter(
                1000, shared_prompts, rank, world_size, two_phase, COST, split_groups=True
            )
            groups.read.clear()
            batch = StepDataset(groups, cutter).__getitems__(range(len(plain)))
            assert sorted(groups.read) == sorted(batch.members)  # its own groups, each once
            assert batch.share is not None
            batches.append(batch)
            own = iter(batch.share.own.tolist())
            values, tokens = [], 0
            for position, group in zip(batch.members, batch.groups, strict=True):
                mine = [i for i in range(group.num_candidates) if next(own)]
                computed[position] += mine
                tokens += len(group.prompt_ids) + sum(len(group.response_ids[i]) for i in mine)
                for i, count in enumerate(group.label_counts):
                    values += [1000.0 * position + 10 * i + 1 if i in mine else 0.0] * count
            assert batch.num_tokens == tokens
            reported += batch.members[: batch.share.num_reported]
            everyone.append(torch.tensor(values))
        for position, group in enumerate(plain):
            assert sorted(computed[position]) == list(range(group.num_candidates))
        assert sorted(reported) == list(range(len(plain)))

        sent: list[torch.Tensor] = []
        for batch, values in zip(batches, everyone, strict=True):
            batch.share.exchange(values.clone(), sent.append)
        total = torch.stack(sent).sum(0)
        assert bool((total > 0).all())
        assert int(torch.stack(sent).count_nonzero()) == len(total)  # nothing sent twice
        for batch, values in zip(batches, everyone, strict=True):
            batch.share.exchange(values, lambda x, total=total: x.copy_(total))
            expected = [
                1000.0 * position + 10 * i + 1
                for position, group in zip(batch.members, batch.groups, strict=True)
                for i, count in enumerate(group.label_counts)
                for _ in range(count)
            ]
            assert values.tolist() == expected


def test_a_joint_step_is_shared_where_its_parts_fit_into_one_pack() -> None:
    groups = worker.make_groups()
    largest = max(group.num_tokens_shared for group in groups)
    for max_tokens, shared in ((largest, True), (largest - 1, False)):
        cutter = StepCutter(max_tokens, True, 0, 8, False, COST, split_groups=True)
        if not shared:
            with pytest.raises(ValueError, match="must fit into max_tokens"):
                cutter(groups, range(len(groups)))
        else:
            assert (cutter(groups, range(len(groups))).share is not None) == shared
    # Two rounds of packs on two processes: no score of a later pack is known in the first.
    cutter = StepCutter(largest, True, 0, 2, False, COST, split_groups=True)
    batch = cutter(groups * 3, range(3 * len(groups)))
    assert batch.share is None and len(batch.packs) > 1
    assert StepCutter(largest, True, 0, 8, False, COST)(groups, range(6)).share is None


def test_an_even_step_is_left_as_it_is() -> None:
    groups = worker.make_groups()[3:4] * 4
    for world_size in (1, 2, 4):
        cutter = StepCutter(1000, True, 0, world_size, True, COST, split_groups=True)
        assert cutter(groups, range(4)).share is None


@pytest.mark.parametrize("max_tokens", [None, 16384])
def test_a_step_of_few_groups_for_each_of_512_processes(max_tokens: int | None) -> None:
    """How much of a step idles when whole groups are dealt, and when candidates are, with prompts
    that are computed again counted as idle; and how much shorter the step becomes. Three candidates
    to a prompt, lengths like OpenAssistant's, responses cut at 1024; the cost of a 1B Llama with a
    vocabulary of 128K. With one prompt per process the costliest candidate alone sets the time."""
    rng = np.random.default_rng(7)
    quantiles = [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 1]
    known = (
        [8, 13, 21, 28, 51, 85, 131, 206, 288, 496, 642, 1009, 1186],
        [9, 108, 192, 270, 340, 439, 533, 698, 926, 1284, 1585, 1783, 2477],
    )
    prompts, total = (np.interp(rng.random(2048), quantiles, q).astype(np.int64) for q in known)
    responses = (rng.dirichlet([3.0] * 3, 2048) * total[:, None]).clip(1, 1024).astype(np.int64)
    cost = PackCost(2 * 0.973e9, 4 * 16 * 2048, 2 * 2048 * 128256)
    for each, before, after, shorter in (
        (1, 0.7, 0.56, 1.6),
        (2, 0.45, 0.2, 1.5),
        (4, 0.05, 0.03, 1.03),
    ):
        count = 512 * each
        sizes = GroupSizes.of_lengths(
            prompts[:count], responses[:count].ravel(), np.full(count, 3, dtype=np.int64)
        )
        costs = cost.of_groups(sizes, True)
        groups: Any = SimpleNamespace(sizes=sizes)
        plan = plan_step(groups, 512, max_tokens=16384, shared_prompts=True, cost=cost)
        whole, mean = max(costs[part].sum() for part in plan), costs.sum() / 512
        deals = deal_candidates(
            sizes, responses.__getitem__, 512, cost=cost, shared_prompts=True,
            max_tokens=max_tokens, costliest=whole,
        )  # fmt: skip
        loads = [whole]
        if deals is not None:
            pieces = [(i, responses[i][list(part)]) for deal in deals for i, part in deal.items()]
            made = GroupSizes.of_lengths(
                np.array([prompts[i] for i, _ in pieces]),
                np.concatenate([own for _, own in pieces]),
                np.array([len(own) for _, own in pieces]),
            )
            ends = np.cumsum([0, *map(len, deals)])
            loads = np.add.reduceat(cost.of_groups(made, True), ends[:-1])
        print(each, 1 - mean / whole, 1 - mean / max(loads), whole / max(loads))
        assert 1 - mean / whole >= before
        assert 1 - mean / max(loads) < after
        assert whole / max(loads) >= shorter
