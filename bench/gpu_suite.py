"""Everything that only a GPU can show, by one command and in under nine minutes.

    python bench/gpu_suite.py --output DIR

runs the tests marked ``gpu``, then the GPU workloads with the peers that are installed, and writes
a CSV a suite, the tests' output and ``summary.md`` into DIR. It needs no network and no install:
started from the repository root it finds the packages beside itself. Every workload is measured in
a process of its own, so that a peer that brings its process down takes no other workload with it;
what no time was left for is listed as such. ``--dry_run`` walks the same way on a CPU with tiny
sizes.
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

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels" / "torch-ext"), str(ROOT / "bench")]

import torch  # noqa: E402
from goals import GPU_GOALS, table  # noqa: E402

from fastrank.benchmarks import environment, report  # noqa: E402
from fastrank.benchmarks.runner import Row  # noqa: E402

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
    tiny: tuple[str, ...]
    """Sizes of a dry run."""


_TINY_LOSS = "--groups=2 --candidates=4 --response=4 --vocab=101 --hidden=16 --dtype=float32"
_TINY_STEP = "--model=llama-2x32 --prompt=8 --candidates=2 --response=4 --dtype=float32"
_TINY_ATTENTION = "--prompt=8 --candidates=2 --response=4 --dtype=float32"
UNITS = [
    Unit("loss", ("K1",), 80, 6.0, tuple(_TINY_LOSS.split())),
    Unit("loss", ("K2",), 50, 4.0, tuple(_TINY_LOSS.split())),
    Unit("loss", ("K3",), 50, 4.0, tuple(_TINY_LOSS.split())),
    Unit("loss", ("K4",), 50, 4.0, tuple(_TINY_LOSS.split())),
    Unit("rank", ("R1-64x8", "R1-512x16", "R1-16x64", "R1-64x8-pro"), 30, 1.0, ("--groups=2",)),
    Unit("attention", ("A1-2048", "A1-512", "A1-256"), 50, 2.0, tuple(_TINY_ATTENTION.split())),
    Unit("step", ("S1-qwen",), 50, 5.0, tuple(_TINY_STEP.split())),
    Unit("step", ("S1-llama",), 50, 5.0, tuple(_TINY_STEP.split())),
]
_TESTS_WEIGHT = 120.0


def main() -> int:
    options = _arguments()
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    device = torch.device("cpu" if options.dry_run else "cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        print("gpu_suite: error: expected a CUDA device, found none (or --dry_run)")
        return 2
    end = time.monotonic() + options.budget - _SHUTDOWN
    tests = "not asked for"
    weights = [unit.weight for unit in UNITS]
    if options.tests:
        share = _TESTS_WEIGHT / (_TESTS_WEIGHT + sum(weights))
        tests = _run_tests(folder, share * (end - time.monotonic()), options.dry_run)
        print(f"tests: {tests}", flush=True)
    rows: list[Row] = []
    notes: list[str] = []
    for index, unit in enumerate(UNITS):
        share = unit.weight / sum(weights[index:]) * (end - time.monotonic())
        measured, note = _measure(unit, device.type, share, options.dry_run)
        rows += measured
        if note:
            notes.append(note)
        print(note or f"{', '.join(unit.workloads)}: measured", flush=True)
        _write(folder, rows, tests, notes, device, options.commit)
    wrong = [row for row in rows if row.ours and row.status in ("wrong", "failed")]
    return 1 if wrong or notes or tests.startswith("failed") else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--output", required=True, help="folder for the results")
    parser.add_argument("--dry_run", "--dry-run", action="store_true", help="tiny, on a CPU")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds in all")
    parser.add_argument("--no_tests", dest="tests", action="store_false", help="measure only")
    parser.add_argument(
        "--commit", default="", help="what is measured, for a copy without its history"
    )
    return parser.parse_args()


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
) -> tuple[list[Row], str | None]:
    """The rows of a unit, and what went wrong with its process, if anything did."""
    names = ", ".join(unit.workloads)
    if seconds < 5.0:
        return [], f"{names}: no time left"
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "fastrank.cli.main", "bench", f"--suite={unit.suite}"]
        command += [f"--device={device}", f"--output={scratch}", "--workload", *unit.workloads]
        # Checks stop early enough for the timing of what was checked.
        command += [f"--time_limit={0.6 * seconds:.1f}"]
        command += ["--seconds=0", *unit.tiny] if dry_run else [f"--seconds={unit.seconds}"]
        if dry_run:
            command.append("--no_memory")
        output, code = _run(command, seconds, dry_run)
        path = Path(scratch) / f"{unit.suite}_{device}.csv"
        rows = report.read_csv(path) if path.exists() else []
    if code is None:
        return rows, f"{names}: stopped after {seconds:.0f} s"
    if code != 0:
        return rows, f"{names}: exit {code}: {(output.strip().splitlines() or [''])[-1][:300]}"
    return rows, None


def _run(command: list[str], seconds: float, dry_run: bool) -> tuple[str, int | None]:
    """Output and exit code; None for a process that had to be stopped, with all it started."""
    paths = [str(ROOT), str(ROOT / "kernels" / "torch-ext"), os.environ.get("PYTHONPATH", "")]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
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
    rows: list[Row],
    tests: str,
    notes: list[str],
    device: torch.device,
    commit: str,
) -> None:
    """The CSV files and the summary, complete after every unit."""
    for row in rows:
        row.commit = row.commit or commit
    where = environment.describe(device)
    lines = ["# GPU suite", "", f"{where['device_name']}; {where['versions']}; "
             f"commit {where['commit'] or commit or 'unknown'}; {where['date']} UTC", "",
             f"Tests marked gpu: {tests}", ""]  # fmt: skip
    lines += [f"- {note}" for note in notes]
    if device.type == "cuda":  # a dry run's sizes are not those that the goals speak of
        lines += ["", "## Goals", "", table(GPU_GOALS, rows)]
    lines += ["", "## Tables", "", "```"]
    for suite in dict.fromkeys(row.suite for row in rows):
        own = [row for row in rows if row.suite == suite]
        report.write_csv(own, folder / f"{suite}_{device.type}.csv")
        for workload in dict.fromkeys(row.workload for row in own):
            lines += [report.table([row for row in own if row.workload == workload]), ""]
    lines += ["```", ""]
    (folder / "summary.md").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
