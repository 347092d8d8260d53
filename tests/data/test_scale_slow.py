"""Forty thousand records through the benchmark of a million: memory, starts, rates, fill."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "data_scale.py"
RECORDS = 40_000


@pytest.mark.slow
def test_many_records(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--records", str(RECORDS), "--work", str(tmp_path)]
    command += [
        "--rounds",
        "3",
        "--starts",
        "1",
        "--sample",
        "1000",
        "--output",
        str(tmp_path / "out"),
    ]
    subprocess.run(command, check=True)
    with (tmp_path / "out" / "data_scale.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = {row["what"]: row for row in rows}

    first, second = (found[f"{which} start, to the first step"] for which in ("first", "second"))
    for start in (first, second):
        assert float(start["peak_anonymous_mib"]) < 1350
    # Of the processor, so that other work on the machine does not count.
    assert float(second["cpu_seconds"]) < 20
    assert float(second["cpu_seconds"]) < float(first["cpu_seconds"]) / 2

    assert float(found["reading"]["of_bare"]) > 3
    assert float(found["read and tokenise, 1 process"]["of_bare"]) > 0.4
    assert float(found["groups into packs"]["of_bare"]) > 0.3

    for name in ("generated", "OASST-like"):
        quarter, whole = (row for row in rows if row["what"] == f"packs of {name} groups, fill")
        assert int(whole["records"]) == RECORDS
        assert float(whole["value"]) >= 0.95
        # Four times the groups, with room for a busy machine.
        assert float(whole["seconds"]) < 4 * 4 * float(quarter["seconds"]) + 0.05
    few = found["a start on few records, to the first step"]
    assert float(second["cpu_seconds"]) < float(few["cpu_seconds"]) + 10
    entries = [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]
    assert len(entries) == 2 and not any(path.suffix for path in entries)
