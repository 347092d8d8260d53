"""Two processes with unequal shares of a step give the gradients of one process."""

from __future__ import annotations

import pytest
import torch
import torch.multiprocessing as mp
import two_phase_processes as worker

import fastrank


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What both processes computed, by (engine, case)."""
    folder = tmp_path_factory.mktemp("two_phase")
    mp.spawn(worker.run, args=(2, str(folder)), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def expected():
    model = worker.make_model()
    groups = worker.make_groups()
    (whole,) = fastrank.pack(groups, max_tokens=4096)
    output = model(pack=whole, loss=fastrank.RRHF(margin=0.1))
    output.loss.backward()
    return worker.gradients(model), output


@pytest.mark.parametrize("case", worker.SHARES)
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_gradients_equal_those_of_one_process(found, expected, engine, case):
    gradients, output = expected
    for rank in range(2):
        got, _, scores = found[rank][engine, case]
        assert got.keys() == gradients.keys()
        for name, reference in gradients.items():
            scale = max(1.0, float(reference.abs().max()))
            assert float((got[name] - reference).abs().max()) <= 1e-6 * scale, (rank, name)
        mine = worker.SHARES[case][rank]
        sizes = [3, 2, 1, 7, 3]
        of_groups = output.scores.split(sizes)
        if mine:
            torch.testing.assert_close(
                scores, torch.cat([of_groups[i] for i in mine]), atol=1e-5, rtol=0
            )
    total = found[0][engine, case][1] + found[1][engine, case][1]
    torch.testing.assert_close(total, output.loss.detach())
