"""All measurements and tests that need a GPU, by one command.

    python -m bench.gpu_suite --output DIR [--stages own kernels tests peers] [--include EARLIER]

from the repository's root. It needs no network, and a checkout that is not installed needs
``PYTHONPATH=.:kernels/torch-ext``. The stages, in this order because time on a GPU is short:

- ``own``: fastrank's variants and the floor of every workload. No deadline skips these.
- ``kernels``: the kernels of four steps, and the device's two ceilings (`bench.gpu_kernels`).
- ``tests``: the tests marked ``gpu``, kernels and the fused loss first.
- ``peers``: everybody else, each taking turns with fastrank, which is timed again for the ratio.

Every workload is measured in a process of its own, and what it found is written before the next
one starts: CSV files per suite, ``summary.md``, the tests' output with each failure when it
happens, and the whole logs. A peer that brings its process down is named and left out of the next
try. ``--include`` takes in the rows of earlier runs, for stages that ran apart; without a stage the
files are merged.

The exit code is 0 only if every result is right, every test passed and every goal was measured.
``--dry_run`` walks the same way on a CPU with tiny sizes.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from bench.goals import GPU_GOALS, goals_table
from bench.gpu_kernels import KernelRow, kernels_table
from bench.gpu_unit import begun_path
from fastrank.benchmarks.provenance import provenance
from fastrank.benchmarks.results import (
    FAILED,
    Measurement,
    own_is_right,
    read_csv,
    text_table,
    write_csv,
)
from fastrank.benchmarks.workloads import SUITES, WORKLOADS

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("own", "kernels", "tests", "peers")
BUDGET = 560.0
_SHUTDOWN = 10.0  # kept for writing
_LEAST = 25.0  # seconds that fastrank's own variants of a workload get in any case
_FEWEST = 8.0  # seconds under which no process of peers is worth its start


class Unit(NamedTuple):
    """A workload, its share of the time, and seconds for its rounds of timing."""

    workload: str
    weight: float
    seconds: float


UNITS = [
    Unit("K1", 40, 4.0),
    Unit("K4", 35, 3.0),
    Unit("S1-qwen", 40, 4.0),
    Unit("S1-llama", 40, 4.0),
    Unit("K2", 30, 3.0),
    Unit("K3", 30, 3.0),
    Unit("A1-2048", 25, 1.5),
    Unit("A1-512", 25, 1.5),
    Unit("A1-256", 25, 1.5),
    Unit("R1-64x8", 15, 1.0),
    Unit("K1-85", 30, 3.0),
    Unit("K1-autocast", 35, 3.0),
    Unit("K3-softcap", 30, 3.0),
    Unit("K4-odd", 30, 3.0),
    Unit("R1-64x8-pro", 15, 1.0),
    Unit("R1-512x16", 15, 1.0),
    Unit("R1-16x64", 15, 1.0),
    Unit("R1-64x8x128", 15, 1.0),
]
"""The most important first."""

TESTS = [
    "tests/kernels/contracts",
    "tests/gpu/test_kernels_gpu.py",
    "tests/gpu/test_linear_loss_gpu.py",
    "tests/gpu/test_step_gpu.py",
    "tests/gpu/test_attention_gpu.py",
    "tests/gpu/test_two_phase_gpu.py",
]
"""All tests marked gpu, the most important first."""


@dataclass
class Suite:
    """One run: where it writes, until when, and what it has found so far."""

    folder: Path
    end: float
    dry_run: bool
    commit: str
    only: list[str] | None = None
    workloads: list[str] | None = None
    rows: list[Measurement] = field(default_factory=list)
    kernels: list[KernelRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tests: str = "not asked for"

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry_run else "cuda")

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    @property
    def units(self) -> list[Unit]:
        return [unit for unit in UNITS if not self.workloads or unit.workload in self.workloads]

    # ---- stages ----------------------------------------------------------------------------------

    def run_own(self, share: float) -> None:
        """fastrank and the floor, ``share`` of the time that is left for all of it."""
        total = share * self.left
        weights = sum(unit.weight for unit in self.units)
        for unit in self.units:
            with tempfile.TemporaryDirectory() as scratch:
                csv = Path(scratch) / "rows.csv"
                seconds = max(_LEAST, total * unit.weight / weights)
                output, code = self._unit(unit, csv, seconds)
                if csv.exists():
                    self._add(read_csv(csv, Measurement))
            self._note(unit.workload, output, code, seconds)
            self.write()

    def run_peers(self) -> None:
        """Everybody else; a workload starts again without a peer that brought it down."""
        for index, unit in enumerate(self.units):
            weights = sum(unit.weight for unit in self.units[index:])
            share = self.left * unit.weight / weights
            with tempfile.TemporaryDirectory() as scratch:
                self._peers_of(unit, share, Path(scratch))
            self.write()

    def _peers_of(self, unit: Unit, seconds: float, scratch: Path) -> None:
        end = time.monotonic() + seconds
        skip: list[str] = []
        while True:
            left = end - time.monotonic()
            if left < _FEWEST and not self.dry_run:
                self.notes.append(f"{unit.workload}, peers: no time left")
                return
            csv = scratch / f"{len(skip)}.csv"
            # A peer that is started late has time to end.
            arguments = ["--peers", f"--last_start={0.6 * left:.1f}"]
            arguments += ["--only", *self.only] if self.only else []
            arguments += ["--skip", *skip] if skip else []
            output, code = self._unit(unit, csv, left, *arguments)
            if csv.exists():
                found = read_csv(csv, Measurement)
                self._add(found)
                skip += [row.variant for row in found]
            begun = begun_path(csv)
            if not begun.exists():
                self._note(f"{unit.workload}, peers", output, code, left)
                return
            name = begun.read_text(encoding="utf-8")
            self._add([self._broken(unit.workload, name, _ending(output, code, left))])
            skip.append(name)
            if code is None:
                self.notes.append(f"{unit.workload}, {name}: stopped after {left:.0f} s")
                return

    def _broken(self, workload: str, variant: str, reason: str) -> Measurement:
        """The row of a peer that took its process with it."""
        w = WORKLOADS[workload]
        known = {field.name for field in dataclasses.fields(Measurement)}
        sizes = {k: v for k, v in dataclasses.asdict(w).items() if k in known}
        given = {
            "workload": workload, "sizes": w.sizes, "device": self.device.type,
            "tokens": w.tokens, "variant": variant, "ours": False, "status": FAILED,
            "reason": reason,
        }  # fmt: skip
        return Measurement(**{**sizes, **provenance(self.device), **given})

    def run_kernels(self) -> None:
        """The kernel table and the ceilings."""
        with tempfile.TemporaryDirectory() as scratch:
            csv = Path(scratch) / "kernels.csv"
            command = [sys.executable, "-m", "bench.gpu_kernels", f"--csv={csv}"]
            seconds = max(_LEAST, min(120.0, self.left))
            output, code = self._run("kernels", command, seconds)
            if csv.exists():
                self.kernels = read_csv(csv, KernelRow)
                csv.replace(self.folder / csv.name)
        self._note("kernels", output, code, seconds)
        self.write()

    def run_tests(self, share: float) -> None:
        """pytest over the tests marked gpu."""
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider"]
        command += ["-p", "bench.failures_at_once", "-v", "--tb=short", "-ra"]
        command += ["-o", "addopts=--import-mode=importlib --strict-markers"]
        command += ["--collect-only", "-q"] if self.dry_run else ["-n", "8", "--maxschedchunk=1"]
        seconds = share * self.left
        path = self.folder / "tests.txt"
        output, code = self._run("tests", [*command, *TESTS], seconds, path)
        self.tests = _verdict(output, code, seconds, self.dry_run)
        print(f"tests: {self.tests}", flush=True)
        self.write()

    # ---- processes -------------------------------------------------------------------------------

    def _unit(
        self, unit: Unit, csv: Path, seconds: float, *arguments: str
    ) -> tuple[str, int | None]:
        command = [sys.executable, "-m", "bench.gpu_unit", unit.workload, f"--csv={csv}"]
        what = f"{unit.workload} {' '.join(arguments[:1])}".strip()
        return self._run(what, [*command, f"--seconds={unit.seconds}", *arguments], seconds)

    def _run(
        self, what: str, command: list[str], seconds: float, path: Path | None = None
    ) -> tuple[str, int | None]:
        """Output and exit code; None for a process that had to be stopped, with all it started.

        The output goes straight to a file: ``path``, or behind the others in ``log.txt``.
        """
        variables = {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
        variables["PYTHONUNBUFFERED"] = "1"
        if self.dry_run:
            variables["TORCH_COMPILE_DISABLE"] = "1"  # compiling takes longer than all the rest
            if "pytest" not in command:
                command = [*command, "--dry_run"]
        path = path or self.folder / "log.txt"
        with path.open("ab") as log:
            log.write(f"\n==== {what}\n".encode())
            log.flush()
            begin = log.tell()
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=variables,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code: int | None = process.wait(timeout=max(1.0, seconds))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                code = None
        with path.open("rb") as log:
            log.seek(begin)
            return log.read().decode(errors="replace"), code

    # ---- results ---------------------------------------------------------------------------------

    def _add(self, rows: list[Measurement]) -> None:
        """Take rows in; a later one of the same workload and variant replaces an earlier."""
        for row in rows:
            row.commit = row.commit or self.commit
        known = {(row.workload, row.variant): row for row in self.rows}
        known.update({(row.workload, row.variant): row for row in rows})
        self.rows = list(known.values())

    def include(self, folder: Path) -> None:
        """Rows, kernels and the tests' verdict of an earlier run."""
        for suite in SUITES:
            for path in sorted(folder.glob(f"{suite}_{self.device.type}.csv")):
                self._add(read_csv(path, Measurement))
        if (path := folder / "kernels.csv").exists():
            self.kernels = read_csv(path, KernelRow)
        if (path := folder / "summary.md").exists():
            found = re.search(r"^Tests marked gpu: (.*)$", path.read_text(encoding="utf-8"), re.M)
            if found and found[1] != "not asked for":
                self.tests = found[1]

    def _note(self, what: str, output: str, code: int | None, seconds: float) -> None:
        if code:
            self.notes.append(f"{what}: {_ending(output, code, seconds)}")
        elif code is None:
            self.notes.append(f"{what}: stopped after {seconds:.0f} s")
        print(self.notes[-1] if code != 0 else f"{what}: measured", flush=True)

    def is_complete(self) -> bool:
        """Whether every result is right, every test passed and every goal was measured."""
        measured = self.dry_run or all(goal.check(self.rows)[1] is not None for goal in GPU_GOALS)
        right = own_is_right(self.rows) and not self.tests.startswith("failed")
        return measured and right and not self.notes

    def _origin(self) -> dict[str, str]:
        """Device, versions, commit and date: those of the newest row, because files are merged on
        another machine than they come from; without a row this machine's."""
        if not self.rows:
            return provenance(self.device if torch.cuda.is_available() else torch.device("cpu"))
        newest = max(self.rows, key=lambda row: row.date)
        return {
            name: getattr(newest, name) for name in ("device_name", "versions", "commit", "date")
        }

    def write(self) -> None:
        """The CSV files and the summary of what there is so far."""
        where = self._origin()
        commit = where["commit"] or self.commit or "unknown"
        lines = ["# GPU suite", "", f"{where['device_name']}; {where['versions']}; "
                 f"commit {commit}; {where['date']} UTC", "",
                 f"Tests marked gpu: {self.tests}", ""]  # fmt: skip
        lines += [f"- {note}" for note in self.notes]
        if not self.dry_run:  # a dry run's sizes are not those that the goals speak of
            lines += ["", "## Goals", "", goals_table(GPU_GOALS, self.rows)]
        if self.kernels:
            lines += ["", "## Kernels", "", kernels_table(self.kernels)]
        lines += ["", "## Tables", "", "```"]
        for suite in dict.fromkeys(row.suite for row in self.rows):
            own = [row for row in self.rows if row.suite == suite]
            write_csv(own, self.folder / f"{suite}_{self.device.type}.csv")
            for workload in dict.fromkeys(row.workload for row in own):
                lines += [text_table([row for row in own if row.workload == workload]), ""]
        lines += ["```", ""]
        (self.folder / "summary.md").write_text("\n".join(lines), encoding="utf-8")


def _ending(output: str, code: int | None, seconds: float) -> str:
    """How a process ended that did not end well, in one line."""
    if code is None:
        return f"stopped after {seconds:.0f} s"
    last = (output.strip().splitlines() or [""])[-1][:300]
    return f"exit {code}: {last}"


def _verdict(output: str, code: int | None, seconds: float, dry_run: bool) -> str:
    """How the tests ended, in one line; nothing passed is a failure, skipped as it may be."""
    last = (output.strip().splitlines() or ["no output"])[-1].strip("= ")
    if code is None:
        reported = len(re.findall(r"^>>> failure", output, re.M))
        return f"failed: not finished in {seconds:.0f} s, {reported} failures until then"
    if code != 0:
        return f"failed: {last}"
    if not dry_run and not re.search(r"\b\d+ passed", last):
        return f"failed: nothing passed: {last}"
    return last


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--stages", nargs="*", choices=STAGES, default=STAGES)
    parser.add_argument("--only", nargs="+", help="peers by name (default: all)")
    parser.add_argument(
        "--workloads", nargs="+", choices=[unit.workload for unit in UNITS], metavar="NAME",
        help=f"of {', '.join(unit.workload for unit in UNITS)} (default: all)",
    )  # fmt: skip
    parser.add_argument("--include", type=Path, nargs="+", default=[], help="earlier outputs")
    parser.add_argument("--dry_run", "--dry-run", action="store_true", help="tiny, on a CPU")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds in all")
    parser.add_argument(
        "--commit", default="", help="measured commit, for a copy without its history"
    )
    options = parser.parse_args()
    for folder in options.include:
        if not folder.is_dir():
            print(f"gpu_suite: error: --include expected a folder, got {folder}", file=sys.stderr)
            return 2
    # A dry run shows that everything runs, however long a busy CPU takes over it.
    seconds = 3600.0 if options.dry_run else options.budget - _SHUTDOWN
    suite = Suite(
        options.output, time.monotonic() + seconds, options.dry_run,
        options.commit, options.only, options.workloads,
    )  # fmt: skip
    if not options.dry_run and options.stages and not torch.cuda.is_available():
        print("gpu_suite: error: expected a CUDA device, got none (or --dry_run)", file=sys.stderr)
        return 2
    options.output.mkdir(parents=True, exist_ok=True)
    for folder in options.include:
        suite.include(folder)
    chosen = set(options.stages)
    if "own" in chosen:
        suite.run_own(1.0 if chosen == {"own"} else 0.5)
    if "kernels" in chosen:
        suite.run_kernels()
    if "tests" in chosen:
        suite.run_tests(0.6 if "peers" in chosen else 1.0)
    if "peers" in chosen:
        suite.run_peers()
    suite.write()
    return 0 if suite.is_complete() else 1


if __name__ == "__main__":
    sys.exit(main())
