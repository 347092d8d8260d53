"""The CPU's tables: about 15 minutes on two cores.

    python -m bench.cpu_suite --output bench/results

measures every CPU workload beside the peers that are installed (the ``peers`` extra) and writes one
CSV per suite. Nothing else should run meanwhile. ``make bench`` runs it, then the scaling curves
(`bench.curves`), the README's tables (`bench.tables`) and the goals (`bench.goals`).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from fastrank.benchmarks.results import own_is_right
from fastrank.benchmarks.runner import RunPlan, run_workloads
from fastrank.benchmarks.workloads import SUITES, choose_workloads

_PLANS = {
    "K5": RunPlan(25.0),
    "K5-bf16": RunPlan(25.0),
    "K5-85": RunPlan(20.0, memory=False, only=("fastrank", "fastrank, every row", "plain PyTorch")),
    "S2": RunPlan(20.0),
    "S2-1024": RunPlan(10.0, memory=False),
    "S2-256": RunPlan(10.0, memory=False),
    "A1-512-cpu": RunPlan(3.0, memory=False),
    "A1-256-cpu": RunPlan(3.0, memory=False),
}
"""The most quoted workloads get most of the time; those not named take two seconds (R1: hundreds of
calls)."""
_OTHERS = RunPlan(2.0, memory=False)


def main() -> int:
    """Measure the suites asked for; 1 if one of fastrank's own results is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--suite", nargs="+", choices=SUITES, default=SUITES, help="default: all")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    rows = []
    for suite in options.suite:
        plans = [(w, _PLANS.get(w.name, _OTHERS)) for w in choose_workloads(suite, "cpu")]
        csv = options.output / f"{suite}_cpu.csv"
        rows += run_workloads(plans, torch.device("cpu"), csv)
    return 0 if own_is_right(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
