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

import torch
from goals import CPU_GOALS, table
from tqdm import tqdm

from fastrank.benchmarks import report, scaling
from fastrank.benchmarks.runner import Row, own_is_right, run_workload
from fastrank.benchmarks.workloads import SUITES, select

# Seconds of timing rounds of each workload.
_SECONDS = {"loss": 25.0, "rank": 2.0, "attention": 5.0, "step": 20.0}
CPU = torch.device("cpu")


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

        measured = run_workload(workload, CPU, seconds=_SECONDS[suite], tick=tick)
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
