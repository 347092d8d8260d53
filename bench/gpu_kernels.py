"""Which kernels a step spends its time in, and what the device could do.

    python -m bench.gpu_kernels --csv kernels.csv

One row per kernel of fastrank's step on K1, K4, S1 and A1, by `torch.profiler`; two rows more are
the ceilings that these are to be held against, measured in the same process on random data: a large
copy, and a bfloat16 product of 8192 x 8192 matrices. GB/s stands where the bytes are known: those
of fastrank's own kernels follow from their arguments (`bench.gpu_counts`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.gpu_counts import kernel_bytes
from bench.gpu_unit import tiny
from fastrank.benchmarks.problem import build_problem
from fastrank.benchmarks.provenance import provenance
from fastrank.benchmarks.results import FASTRANK, markdown_table, write_csv
from fastrank.benchmarks.timing import copy_bandwidth, product_rate
from fastrank.benchmarks.workloads import WORKLOADS

PROFILED = ("K1", "K4", "S1-qwen", "A1-2048")
CEILINGS = "ceilings"
_STEPS = 3


@dataclass
class KernelRow:
    """One kernel of a workload's step: its calls and time in one run."""

    workload: str
    kernel: str
    calls: float
    microseconds: float
    gigabytes_per_second: float | None = None
    """Bytes read and written over time; None where the bytes are not known."""
    teraflops: float | None = None
    """Of the ceiling's product."""


def ceilings(device: torch.device, size: int = 8192) -> list[KernelRow]:
    """The two ceilings of the device."""
    bandwidth, rate = copy_bandwidth(device), product_rate(device, size)
    product_us = 2 * size**3 / rate * 1e6
    return [
        KernelRow(CEILINGS, "copy of 1 GiB", 1, 2 * 2**30 / bandwidth * 1e6, bandwidth / 1e9),
        KernelRow(CEILINGS, f"{size}³ product", 1, product_us, teraflops=rate / 1e12),
    ]


def kernel_rows(
    name: str, step: Callable[[], Any], device: torch.device, sizes: Mapping[str, int]
) -> list[KernelRow]:
    """The kernels of a step, the longest first; ``sizes`` are bytes per step, by kernel."""
    step()
    step()  # kernels are compiled, libraries have chosen
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with profile(activities=activities) as profiler:
        for _ in range(_STEPS):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    rows = []
    for event in profiler.key_averages():
        if device.type == "cuda":
            if event.device_type != DeviceType.CUDA:
                continue
            total = event.self_device_time_total
        else:
            total = event.self_cpu_time_total
        microseconds = total / _STEPS
        moved = sizes.get(event.key)
        rate = None if moved is None or not total else moved / microseconds / 1e3
        rows.append(KernelRow(name, event.key[:120], event.count / _STEPS, microseconds, rate))
    return sorted(rows, key=lambda row: -row.microseconds)


def kernels_table(rows: list[KernelRow], most: int = 14) -> str:
    """Markdown: the kernels that take longest, per workload."""
    lines = []
    for workload in dict.fromkeys(row.workload for row in rows):
        own = [row for row in rows if row.workload == workload]
        total = sum(row.microseconds for row in own)
        for row in own[:most]:
            share = "" if workload == CEILINGS else f"{row.microseconds / max(total, 1e-9):.1%}"
            reached = "" if row.teraflops is None else f"{row.teraflops:.0f} TFLOP/s"
            if row.gigabytes_per_second is not None:
                reached = f"{row.gigabytes_per_second:,.0f} GB/s"
            cells = (f"{row.calls:.3g}", f"{row.microseconds:,.1f}", share, reached)
            lines.append((workload, f"`{row.kernel[:70]}`", *cells))
    return markdown_table(("workload", "kernel", "calls", "µs", "share", "reached"), lines, texts=2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0], allow_abbrev=False)
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--dry_run", action="store_true", help="tiny, on a CPU")
    options = parser.parse_args()
    device = torch.device("cpu" if options.dry_run else "cuda")
    about = provenance(device)
    rows = ceilings(device, 64 if options.dry_run else 8192)
    write_csv(rows, options.csv, about)
    failed = False
    for name in PROFILED:
        workload = tiny(WORKLOADS[name]) if options.dry_run else WORKLOADS[name]
        try:
            problem = build_problem(workload, device)
            variant = next(v for v in problem.variants if v.name == FASTRANK)
            sizes = kernel_bytes(workload) if device.type == "cuda" else {}
            rows += kernel_rows(name, variant.make(problem), device, sizes)
        except Exception as error:  # the other workloads still count
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
            failed = True
        write_csv(rows, options.csv, about)
        print(f"{name}: profiled", flush=True)
    print(kernels_table(rows))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
