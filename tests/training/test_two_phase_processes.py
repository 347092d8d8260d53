"""Two processes with unequal shares of a step give the gradients of one process: in two phases and
jointly, under DDP and FSDP2, with the head sharded with the root, tied, and by itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
import two_phase_processes as worker
from pack_cases import assert_same_gradients, one_pack
from torchrun import filled_once

import fastrank


def _run_both(folder: Path) -> None:
    mp.start_processes(worker.run, (2, str(folder)), nprocs=2, start_method="fork")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What both processes computed, by (engine, case)."""
    folder = filled_once(tmp_path_factory, "two_phase_processes", _run_both)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def expected():
    """What one process computes without an engine, by engine."""
    found = {}
    for engine in worker.ENGINES:
        model = worker.make_model(engine)
        output = model(pack=one_pack(worker.make_groups()), loss=fastrank.RRHF(margin=0.1))
        output.loss.backward()
        found[engine] = worker.bare_gradients(model), output
    return found


@pytest.mark.parametrize("case", ["uneven", "empty", "joint"])
@pytest.mark.parametrize("engine", worker.ENGINES)
def test_gradients_equal_those_of_one_process(found, expected, engine, case):
    gradients, output = expected[engine]
    sizes = [3, 2, 1, 7, 3]
    for rank in range(2):
        got, _, scores = found[rank][engine, case]
        assert_same_gradients(got, gradients, 1e-6)
        of_groups = output.scores.split(sizes)
        mine = worker.SHARES["empty" if case == "empty" else "uneven"][rank]
        assert len(scores) == sum(sizes[i] for i in mine)
        if mine:
            torch.testing.assert_close(
                scores, torch.cat([of_groups[i] for i in mine]), atol=1e-5, rtol=0
            )
    total = found[0][engine, case][1] + found[1][engine, case][1]
    torch.testing.assert_close(total, output.loss.detach())
