"""The CPU's tables and plots: what ``make bench`` runs, about 20 minutes on two cores.

    python bench/cpu_suite.py --output bench/results

measures every CPU workload beside the peers that are installed (the ``peers`` extra), then the
scaling curves, and writes a CSV a suite, ``curves_cpu.csv`` and one PNG a curve. Nothing else
should run meanwhile. ``bench/tables.py`` makes the README's tables from the CSV files.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from goals import CPU_GOALS, table
from tqdm import tqdm

from fastrank.benchmarks import report, scaling
from fastrank.benchmarks.runner import Row, own_is_right, run_workload
from fastrank.benchmarks.workloads import SUITES, select

CPU = torch.device("cpu")


class Plan(NamedTuple):
    """How a workload is measured; what is quoted most gets most of the time."""

    seconds: float = 5.0
    min_rounds: int = 5
    with_memory: bool = False
    only: tuple[str, ...] | None = None


_PLANS = {
    "K5": Plan(25.0, with_memory=True),
    "K5-bf16": Plan(25.0, with_memory=True),
    "K5-85": Plan(20.0, only=("fastrank", "fastrank, every row", "plain PyTorch")),
    "S2": Plan(20.0, with_memory=True),
    "S2-1024": Plan(10.0),
    "S2-256": Plan(10.0),
    "A1-512-cpu": Plan(3.0),
    "A1-256-cpu": Plan(3.0),
}
"""Workloads that are not named take two seconds (R1: hundreds of calls)."""


def main() -> int:
    """Measure what is asked for; 1 if one of fastrank's own results is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--suite", nargs="+", choices=(*SUITES, "curves"), help="default: all")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    wanted = options.suite or (*SUITES, "curves")
    rows: list[Row] = []
    for suite in SUITES:
        if suite in wanted:
            rows += _run_suite(suite, options.output)
    if "curves" in wanted:
        rows += _run_curves(options.output)
    print(table(CPU_GOALS, rows))
    return 0 if own_is_right(rows) else 1


def _run_suite(suite: str, folder: Path) -> list[Row]:
    rows: list[Row] = []
    bar = tqdm(select(suite, "cpu"), unit="workload", file=sys.stderr, disable=None)
    for workload in bar:

        def tick(what: str, name: str = workload.name) -> None:
            bar.set_description(f"{name}: {what}")

        plan = _PLANS.get(workload.name, Plan(2.0))
        measured = run_workload(workload, CPU, tick=tick, **plan._asdict())
        rows += measured
        bar.clear()
        print(report.table(measured), flush=True)
    report.write_csv(rows, folder / f"{suite}_cpu.csv")
    return rows


def _run_curves(folder: Path) -> list[Row]:
    bar = tqdm(unit="run", file=sys.stderr, disable=None)
    rows = scaling.run_curves(CPU, tick=bar.set_description)
    bar.close()
    report.write_csv(rows, folder / "curves_cpu.csv")
    for path in scaling.plot_curves(rows, folder):
        print(path)
    return rows


if __name__ == "__main__":
    sys.exit(main())
