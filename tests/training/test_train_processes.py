"""Two processes, started by torchrun, give the run of one: DDP and FSDP2's ``fully_shard``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import train_processes as worker
from torchrun import filled_once, torchrun

ALONE = ("one pack", "skip", "shared candidates", "stream")  # by one process
SAME = [case for case in worker.CASES if case not in ("outside", "stream, divided")]
WORK = {"backprop_fraction", "work_saved"}  # of two phases alone
LOGGED = ("loss", "rank_loss", "sft_loss", "rewards/accuracies", "rewards/margins", "live_fraction")


def _run_all(folder: Path) -> None:
    for case in ALONE:
        torch.save(worker.run_case(folder, case, 1), folder / f"{case}.pt")
    torchrun(2, str(Path(worker.__file__)), str(folder), *worker.CASES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return filled_once(tmp_path_factory, "train_processes", _run_all)


@pytest.fixture(scope="module")
def found(folder: Path) -> Any:
    """Results of each of the two processes, by case."""
    return {
        case: [torch.load(folder / f"{case}-{rank}.pt", weights_only=True) for rank in (0, 1)]
        for case in worker.CASES
    }


@pytest.fixture(scope="module")
def expected(folder: Path) -> Any:
    """Results of one process, by case; the same for cases that differ in nothing it sees."""
    whole, skip, shared, stream = (torch.load(folder / f"{case}.pt") for case in ALONE)
    by_case = dict.fromkeys(worker.CASES, whole) | {"skip": skip, "stream": stream}
    return by_case | {case: shared for case in worker.CASES if case.startswith("shared")}


def _difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[key] - other[key]).abs().max().item() for key in one)


@pytest.mark.parametrize("case", SAME)
def test_weights_losses_and_gradient_norms_are_those_of_one_process(
    found: Any, expected: Any, case: str
) -> None:
    start = worker.tiny_llama(0).state_dict()
    want = expected[case]
    for got in found[case]:
        assert _difference(got["weights"], want["weights"]) < 2e-6
        assert _difference(got["weights"], start) > 1e-3
        assert [row["step"] for row in got["log"]] == list(range(1, worker.STEPS + 1))
        for key in ("loss", "grad_norm"):
            assert [row[key] for row in got["log"]] == pytest.approx(
                [row[key] for row in want["log"]], rel=2e-5
            )
    assert _difference(found[case][0]["weights"], found[case][1]["weights"]) == 0


@pytest.mark.parametrize("case", [case for case in SAME if "fully_shard" not in case])
def test_what_is_logged_and_evaluated_is_the_same(found: Any, expected: Any, case: str) -> None:
    want = expected[case]
    for got in found[case]:
        for row, row_wanted in zip(got["log"], want["log"], strict=True):
            assert row.keys() - WORK == row_wanted.keys()
            for key in (*LOGGED, "skipped_records"):
                wanted = pytest.approx(row_wanted.get(key, 0.0), rel=1e-4, abs=1e-5)
                assert row.get(key, 0.0) == wanted, key
        for key, value in want["evaluation"].items():
            if "runtime" not in key and "per_second" not in key:
                assert got["evaluation"][key] == pytest.approx(value, rel=1e-4, abs=1e-5), key


def test_a_loss_outside_the_wrapped_forward_would_be_seen(found: Any, expected: Any) -> None:
    """The negative control: DDP synchronises nothing then, and says nothing."""
    outside, want = found["outside"], expected["outside"]["weights"]
    assert _difference(outside[0]["weights"], want) > 1e-3
    assert _difference(outside[0]["weights"], outside[1]["weights"]) > 1e-3


def test_one_step_of_an_epoch_shared_candidates(found: Any) -> None:
    for case, results in found.items():
        wanted = worker.STEPS / 2 if case.startswith("shared") else 0
        assert all(got.get("shared", 0) == wanted for got in results), case


def test_the_bad_record_was_skipped_on_both(found: Any) -> None:
    for got in found["skip"]:
        skipped = [row.get("skipped_records", 0.0) for row in got["log"]]
        assert sum(skipped) == worker.STEPS / 2  # once per epoch


def test_data_that_differ_between_processes_are_refused(found: Any) -> None:
    """Each would plan its part of another step."""
    for got in found["stream, divided"]:
        assert "train_dataset must be the same on every process" in got["error"]
        assert "stream" in got["error"] and "\n" not in got["error"]


def test_processes_agree_on_the_pack_size_of_the_smaller_device(found: Any) -> None:
    sizes = {got["max_tokens"] for got in found["find"]}
    assert len(sizes) == 1
    assert 90 <= sizes.pop() <= 130
