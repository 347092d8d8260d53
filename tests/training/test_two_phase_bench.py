"""The benchmark of two-phase training at small sizes, and its claim about memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench import two_phase
from fastrank.benchmarks.results import read_csv

TINY = [
    "--prompt=8", "--response=6", "--vocab=97", "--hidden=64", "--layers=1", "--max_tokens=64",
    "--time_groups=6", "--seconds=0",
]  # fmt: skip


def test_fewer_tokens_are_back_propagated_in_the_proportion_logged(tmp_path: Path) -> None:
    output = tmp_path / "time.csv"
    two_phase.main([*TINY, "--only=time", f"--output={output}"])
    rows = {row.mode: row for row in read_csv(output, two_phase.Row)}
    assert rows.keys() == set(two_phase.MODES)
    assert all(row.ms is not None and row.ms > 0 for row in rows.values())
    two: Any = rows["two-phase"]
    assert two.accuracy == pytest.approx(0.85, abs=0.05)
    share = two.tokens_backpropagated / two.tokens_joint
    assert two.live_fraction < share < 1
    work = (two.tokens_scored / two.tokens_joint + 3 * share) / 4
    assert two.work_saved == pytest.approx(1 - work, abs=1e-3)
    assert two.gradient_error < 1e-5


def test_nothing_is_timed_that_is_wrong(tmp_path: Path, monkeypatch: Any) -> None:
    right = two_phase.make_step

    def wrong(mode: str, model: Any, groups: Any, max_tokens: int) -> Any:
        part = groups[1:] if mode == "two-phase" else groups
        return right(mode, model, part, max_tokens)

    monkeypatch.setattr(two_phase, "make_step", wrong)
    with pytest.raises(RuntimeError, match="nothing is timed"):
        two_phase.main([*TINY, "--only=time", f"--output={tmp_path / 'time.csv'}"])
    assert not (tmp_path / "time.csv").exists()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_candidates(tmp_path: Path) -> None:
    output = tmp_path / "memory.csv"
    two_phase.main(["--only=memory", "--candidates", "8", "64", f"--output={output}"])
    rows: list[Any] = read_csv(output, two_phase.Row)
    peaks = {(row.mode, row.candidates): row.peak_mib for row in rows}
    assert peaks["two-phase", 64] <= 1.3 * peaks["two-phase", 8]
    assert peaks["joint", 64] > 2 * peaks["joint", 8]
