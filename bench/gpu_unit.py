"""One workload of the GPU suite in a process of its own: fastrank's variants, or every peer.

    python -m bench.gpu_unit K1 --csv own.csv
    python -m bench.gpu_unit K1 --csv peers.csv --peers [--skip NAME ...]

fastrank's variants and the floor are checked and timed together. Peers follow one by one, each
taking turns with fastrank, and every row is written before the next peer is touched: a peer that
brings the process down costs itself alone. Its name stands in a file beside the CSV, so that
whoever started this process can start another that skips it.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import sys
import time
from pathlib import Path

import torch

from fastrank.benchmarks.problem import build_problem
from fastrank.benchmarks.results import FASTRANK, Measurement, own_is_right, text_table, write_csv
from fastrank.benchmarks.runner import RunPlan, run_workload
from fastrank.benchmarks.workloads import WORKLOADS, Workload, resize

_TINY = {
    "loss": {
        "groups": 4, "candidates": 4, "response": 4, "vocab": 101, "hidden": 16,
    },
    "rank": {"groups": 2},
    "attention": {"prompt": 8, "candidates": 2, "response": 4},
    "step": {"model": "llama-2x32", "prompt": 8, "candidates": 4, "response": 4},
}  # fmt: skip


def tiny(workload: Workload) -> Workload:
    """The workload in the sizes of a dry run, on a CPU."""
    small = resize(workload, **_TINY[workload.suite])
    narrow = "bfloat16" if workload.autocast else "float32"
    return dataclasses.replace(small, dtype=narrow)


def begun_path(csv: Path) -> Path:
    """The file that holds the name of the variant which a run for ``csv`` has begun."""
    return csv.with_suffix(".begun")


def measure_own(workload: Workload, device: torch.device, plan: RunPlan) -> list[Measurement]:
    """Rows of fastrank's variants, with the floor beside them."""
    problem = build_problem(workload, device)
    names = [variant.name for variant in problem.variants if variant.ours]
    return run_workload(
        workload, device, dataclasses.replace(plan, only=names), problem=problem, tick=_tell
    )


def measure_peers(
    workload: Workload,
    device: torch.device,
    plan: RunPlan,
    csv: Path,
    only: list[str] | None = None,
    skip: list[str] | None = None,
) -> list[Measurement]:
    """Rows of the peers, written after each; those in ``skip`` are left out."""
    problem = build_problem(workload, device)
    rows: list[Measurement] = []
    for variant in problem.variants:
        chosen = only is None or variant.name in only
        if variant.ours or not chosen or variant.name in (skip or ()):
            continue
        begun_path(csv).write_text(variant.name, encoding="utf-8")
        names = [variant.name]
        if variant.missing(problem) is None:
            names.insert(0, FASTRANK)
        pair = dataclasses.replace(plan, only=names)
        measured = run_workload(workload, device, pair, problem=problem, tick=_tell)
        if len(names) > 1:
            print(text_table(measured), flush=True)
        rows += [row for row in measured if row.variant == variant.name]
        write_csv(rows, csv)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    begun_path(csv).unlink(missing_ok=True)
    return rows


def _tell(what: str) -> None:
    """Progress for the log: a process that hangs says where."""
    if not what.startswith("round"):
        print(f"  {what}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0], allow_abbrev=False)
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--peers", action="store_true", help="the peers, not fastrank's own")
    parser.add_argument("--only", nargs="*", help="peers by name")
    parser.add_argument("--skip", nargs="*", default=[], help="peers to leave out")
    parser.add_argument("--seconds", type=float, default=5.0, help="for the rounds of timing")
    parser.add_argument("--last_start", type=float, help="seconds after which no peer is started")
    parser.add_argument("--dry_run", action="store_true", help="tiny, on a CPU")
    options = parser.parse_args()
    device = torch.device("cpu" if options.dry_run else "cuda")
    workload = WORKLOADS[options.workload]
    deadline = None
    if options.last_start is not None:
        deadline = time.monotonic() + options.last_start
    plan = RunPlan(seconds=options.seconds, deadline=deadline)
    if options.dry_run:
        workload = tiny(workload)
        plan = dataclasses.replace(plan, seconds=0.0, memory=False)
    if options.peers:
        rows = measure_peers(workload, device, plan, options.csv, options.only, options.skip)
    else:
        rows = measure_own(workload, device, plan)
        print(text_table(rows), flush=True)
        write_csv(rows, options.csv)
    return 0 if own_is_right(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
