"""Every contract of the kernels on a CPU, under triton's interpreter.

Whether a kernel is interpreted is decided when triton is first imported, and a process that
interprets cannot compile. So the contracts run in two processes of their own, with their report as
this test's message.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

CONTRACTS = sorted((Path(__file__).parent / "contracts").glob("test_*_contract.py"))
RANK = [path for path in CONTRACTS if "rank" in path.stem]
ROWS = [path for path in CONTRACTS if path not in RANK]


def interpret(paths: list[Path], selection: str) -> str:
    """Run the selected tests of some files in an interpreting process; its summary line."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        *map(str, paths),
        "-q",
        "-m",
        selection,
        "--no-header",
    ]
    command += ["-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout.strip().splitlines()[-1]


def number_passed(summary: str) -> int:
    found = re.search(r"(\d+) passed", summary)
    return int(found.group(1)) if found else 0


@pytest.mark.parametrize("paths", [RANK, ROWS], ids=["rank", "rows"])
def test_contracts(paths: list[Path]) -> None:
    summary = interpret(paths, "not slow and not gpu")
    assert number_passed(summary) >= 150, summary
    assert "skipped" not in summary, summary


@pytest.mark.slow
@pytest.mark.parametrize(("subject", "count"), [("rank", 3), ("narrow", 4)])
def test_slow_contracts(subject: str, count: int) -> None:
    paths = [path for path in CONTRACTS if subject in path.stem]
    assert number_passed(interpret(paths, "slow and not gpu")) >= count


def test_no_contract_is_left_out() -> None:
    assert len(CONTRACTS) == 7
