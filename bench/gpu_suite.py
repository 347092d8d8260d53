"""All measurements and tests that need a GPU, by one command and in under nine minutes.

    python -m bench.gpu_suite --output DIR

from the repository's root runs the tests marked ``gpu``, then the GPU workloads with the peers that
are installed, and writes one CSV per suite, the tests' output and ``summary.md`` into DIR. It needs
no network. Where fastrank is not installed, put the checkout on the path:

    PYTHONPATH=.:kernels/torch-ext python -m bench.gpu_suite --output DIR

Every unit of workloads is measured in a process of its own, so that a peer that brings its process
down takes no other unit with it; work that no time was left for is listed as such. ``--dry_run``
walks the same way on a CPU with tiny sizes.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

from bench.goals import GPU_GOALS, goals_table
from fastrank.benchmarks.provenance import provenance
from fastrank.benchmarks.results import (
    Measurement,
    own_is_right,
    read_csv,
    text_table,
    write_csv,
)

ROOT = Path(__file__).resolve().parents[1]
BUDGET = 500.0
_SHUTDOWN = 15.0  # kept for merging and writing
_LOG_LIMIT = 2_000_000


class Unit(NamedTuple):
    """Workloads that share a process, and their share of the time."""

    suite: str
    workloads: tuple[str, ...]
    weight: float
    seconds: float
    """For the timing rounds of each workload."""
    tiny: str
    """Sizes of a dry run."""


_LOSS = "--groups=2 --candidates=4 --response=4 --vocab=101 --hidden=16 --dtype=float32"
_STEP = "--model=llama-2x32 --prompt=8 --candidates=2 --response=4 --dtype=float32"
_ATTENTION = "--prompt=8 --candidates=2 --response=4 --dtype=float32"
UNITS = [
    Unit("loss", ("K1",), 80, 6.0, _LOSS),
    Unit("loss", ("K2",), 50, 4.0, _LOSS),
    Unit("loss", ("K3",), 50, 4.0, _LOSS),
    Unit("loss", ("K4",), 50, 4.0, _LOSS),
    Unit("rank", ("R1-64x8", "R1-512x16", "R1-16x64", "R1-64x8-pro"), 30, 1.0, "--groups=2"),
    Unit("attention", ("A1-2048", "A1-512", "A1-256"), 50, 2.0, _ATTENTION),
    Unit("step", ("S1-qwen",), 50, 5.0, _STEP),
    Unit("step", ("S1-llama",), 50, 5.0, _STEP),
]
_TESTS_WEIGHT = 120.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--dry_run", "--dry-run", action="store_true", help="tiny, on a CPU")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds in all")
    parser.add_argument("--no_tests", dest="tests", action="store_false", help="measure only")
    parser.add_argument(
        "--commit", default="", help="measured commit, for a copy without its history"
    )
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    device = torch.device("cpu" if options.dry_run else "cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        print("gpu_suite: error: expected a CUDA device, found none (or --dry_run)")
        return 2
    end = time.monotonic() + options.budget - _SHUTDOWN
    tests = "not asked for"
    weights = [unit.weight for unit in UNITS]
    if options.tests:
        share = _TESTS_WEIGHT / (_TESTS_WEIGHT + sum(weights))
        tests = _run_tests(options.output, share * (end - time.monotonic()), options.dry_run)
        print(f"tests: {tests}", flush=True)
    rows: list[Measurement] = []
    notes: list[str] = []
    for index, unit in enumerate(UNITS):
        share = unit.weight / sum(weights[index:]) * (end - time.monotonic())
        measured, note = _measure(unit, device.type, share, options.dry_run)
        rows += measured
        if note:
            notes.append(note)
        print(note or f"{', '.join(unit.workloads)}: measured", flush=True)
        _write(options.output, rows, tests, notes, device, options.commit)
    return 0 if own_is_right(rows) and not notes and not tests.startswith("failed") else 1


def _run_tests(folder: Path, seconds: float, dry_run: bool) -> str:
    """pytest over the tests marked gpu; one line that says how it ended."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    command += ["-o", "addopts=--import-mode=importlib --strict-markers", "tests"]
    if dry_run:
        command.append("--collect-only")
    output, code = _run(command, seconds, dry_run)
    (folder / "tests.txt").write_text(output[-_LOG_LIMIT:], encoding="utf-8")
    last = (output.strip().splitlines() or ["no output"])[-1].strip("= ")
    if code is None:
        return f"failed: not finished in {seconds:.0f} s"
    return last if code == 0 else f"failed: {last}"


def _measure(
    unit: Unit, device: str, seconds: float, dry_run: bool
) -> tuple[list[Measurement], str | None]:
    """The rows of a unit, and the failure of its process, if there was one."""
    names = ", ".join(unit.workloads)
    if seconds < 5.0:
        return [], f"{names}: no time left"
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "fastrank.cli.main", "bench", f"--suite={unit.suite}"]
        command += [f"--device={device}", f"--output={scratch}", "--workload", *unit.workloads]
        # Checks stop early enough for the timing that follows.
        command += [f"--time_limit={0.6 * seconds:.1f}"]
        if dry_run:
            command += ["--seconds=0", "--no_memory", *unit.tiny.split()]
        else:
            command += [f"--seconds={unit.seconds}"]
        output, code = _run(command, seconds, dry_run)
        path = Path(scratch) / f"{unit.suite}_{device}.csv"
        rows = read_csv(path, Measurement) if path.exists() else []
    if code is None:
        return rows, f"{names}: stopped after {seconds:.0f} s"
    if code != 0:
        return rows, f"{names}: exit {code}: {(output.strip().splitlines() or [''])[-1][:300]}"
    return rows, None


def _run(command: list[str], seconds: float, dry_run: bool) -> tuple[str, int | None]:
    """Output and exit code; None for a process that had to be stopped, with all it started."""
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    if dry_run:
        variables["TORCH_COMPILE_DISABLE"] = "1"  # compiling takes longer than all the rest
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=variables,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(timeout=max(1.0, seconds))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = None
        output.seek(0)
        return output.read(), code


def _write(
    folder: Path,
    rows: list[Measurement],
    tests: str,
    notes: list[str],
    device: torch.device,
    commit: str,
) -> None:
    """The CSV files and the summary, complete after every unit."""
    for row in rows:
        row.commit = row.commit or commit
    where = provenance(device)
    lines = ["# GPU suite", "", f"{where['device_name']}; {where['versions']}; "
             f"commit {where['commit'] or commit or 'unknown'}; {where['date']} UTC", "",
             f"Tests marked gpu: {tests}", ""]  # fmt: skip
    lines += [f"- {note}" for note in notes]
    if device.type == "cuda":  # a dry run's sizes are not those that the goals speak of
        lines += ["", "## Goals", "", goals_table(GPU_GOALS, rows)]
    lines += ["", "## Tables", "", "```"]
    for suite in dict.fromkeys(row.suite for row in rows):
        own = [row for row in rows if row.suite == suite]
        write_csv(own, folder / f"{suite}_{device.type}.csv")
        for workload in dict.fromkeys(row.workload for row in own):
            lines += [text_table([row for row in own if row.workload == workload]), ""]
    lines += ["```", ""]
    (folder / "summary.md").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
