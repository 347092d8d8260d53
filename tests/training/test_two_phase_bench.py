"""The benchmark of two-phase training at small sizes, and its claim about memory."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "two_phase.py"
TINY = [
    "--prompt=8", "--response=6", "--vocab=97", "--hidden=64", "--layers=1", "--max_tokens=64",
    "--time_groups=6", "--seconds=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def bench() -> Any:
    spec = importlib.util.spec_from_file_location("bench_two_phase", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_fewer_tokens_are_back_propagated_in_the_proportion_logged(
    bench: Any, tmp_path: Path
) -> None:
    output = tmp_path / "time.csv"
    bench.main([*TINY, "--only=time", f"--output={output}"])
    rows = {row["mode"]: row for row in rows_of(output)}
    assert rows.keys() == set(bench.MODES) and all(float(row["ms"]) > 0 for row in rows.values())
    two = rows["two-phase"]
    assert float(two["accuracy"]) == pytest.approx(0.85, abs=0.05)
    share = int(two["tokens_backpropagated"]) / int(two["tokens_joint"])
    assert float(two["live_fraction"]) < share < 1
    work = (int(two["tokens_scored"]) / int(two["tokens_joint"]) + 3 * share) / 4
    assert float(two["work_saved"]) == pytest.approx(1 - work, abs=1e-3)
    assert float(two["gradient_error"]) < 1e-5


def test_nothing_is_timed_that_is_wrong(bench: Any, tmp_path: Path, monkeypatch: Any) -> None:
    right = bench.make_step

    def wrong(mode: str, model: Any, groups: Any, max_tokens: int) -> Any:
        part = groups[1:] if mode == "two-phase" else groups
        return right(mode, model, part, max_tokens)

    monkeypatch.setattr(bench, "make_step", wrong)
    with pytest.raises(RuntimeError, match="nothing is timed"):
        bench.main([*TINY, "--only=time", f"--output={tmp_path / 'time.csv'}"])
    assert not (tmp_path / "time.csv").exists()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_candidates(bench: Any, tmp_path: Path) -> None:
    output = tmp_path / "memory.csv"
    bench.main(["--only=memory", "--candidates", "8", "64", f"--output={output}"])
    peaks = {(row["mode"], row["candidates"]): float(row["peak_mib"]) for row in rows_of(output)}
    assert peaks["two-phase", "64"] <= 1.3 * peaks["two-phase", "8"]
    assert peaks["joint", "64"] > 2 * peaks["joint", "8"]
