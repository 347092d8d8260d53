"""Scaling curves: one size goes up, everything else stays.

    python -m bench.curves --output bench/results

writes ``curves_cpu.csv`` and one PNG per curve. The sizes are those that two CPU cores can sweep in
minutes: the model of the step curves has 4 layers of width 128 and 8,192 vocabulary entries, and
the vocabulary curve takes 256 tokens of width 128. The curves are for their shape, which depends on
ratios of lengths. The last curve looks for the prompt length from which sharing pays.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastrank.benchmarks.results import FASTRANK, OK, Measurement, own_is_right
from fastrank.benchmarks.runner import RunPlan, run_workloads
from fastrank.benchmarks.workloads import Workload

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Curve:
    """``field`` of ``base`` takes the ``values``; ``variants`` are drawn."""

    name: str
    title: str
    axis: str
    field: str
    base: Workload
    values: tuple[int, ...]
    variants: tuple[str, ...]

    def workloads(self) -> list[Workload]:
        """One per value."""
        made = []
        for value in self.values:
            change: dict[str, Any] = {"name": f"{self.name}={value}", self.field: value}
            made.append(dataclasses.replace(self.base, **change))
        return made


def _step(candidates: int, response: int = 64) -> Workload:
    return Workload("", "step", ("cpu",), 1, candidates, response, 256, model="llama-4x128")


_LAYOUTS = (
    FASTRANK, "no sharing, padding-free", "dense mask", "padded, responses projected",
    "published loop",
)  # fmt: skip
_HEADS = (
    FASTRANK, "plain PyTorch", "F.linear_cross_entropy", "liger scaled CE, generic",
    "TRL ChunkedLogProb",
)  # fmt: skip
_SHARING = (FASTRANK, "fastrank, padded rows", "fastrank, layout by auto")
CURVES = [
    Curve("n", "A training step by the number of candidates", "candidates n (P 256, R 64)",
          "candidates", _step(8), (2, 4, 8, 16, 32, 64),
          _LAYOUTS),
    Curve("P", "A training step by the length of the prompt", "prompt tokens P (n 4, R 64)",
          "prompt", _step(4), (64, 256, 1024, 4096), _LAYOUTS),
    Curve("R", "A training step by the length of the responses", "response tokens R (n 4, P 256)",
          "response", _step(4), (32, 128, 512, 1024),
          _LAYOUTS),
    Curve("V", "The loss by the size of the vocabulary", "vocabulary V (T 256, D 128)", "vocab",
          Workload("", "loss", ("cpu",), 1, 4, 64, vocab=32000, hidden=128),
          (32768, 65536, 131072, 262144), _HEADS),
    Curve("crossover", "From which prompt on sharing it is faster than padded rows",
          "prompt tokens P (n 4, R 256)", "prompt", _step(4, 256), (4, 8, 16, 32, 64),
          _SHARING),
]  # fmt: skip


def plot_curves(rows: list[Measurement], folder: Path) -> list[Path]:
    """One PNG per curve: milliseconds over the size, both logarithmic. A curve on which one of
    fastrank's own results was wrong is not drawn."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    written = []
    for curve in CURVES:
        own = [row for row in rows if row.workload.startswith(f"{curve.name}=")]
        if not own or not own_is_right(own):
            continue
        figure = Figure(figsize=(6.4, 4.2), layout="tight")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for variant in curve.variants:
            points = [row for row in own if row.variant == variant and row.status == OK]
            if points:
                x = [int(row.workload.split("=")[1]) for row in points]
                y = [row.median_ms or float("nan") for row in points]
                width = 2 if variant.startswith(FASTRANK) else 1
                axes.plot(x, y, marker="o", label=variant, linewidth=width)
        axes.set_xscale("log", base=2)
        axes.set_xticks(curve.values, [f"{value:,}" for value in curve.values])
        times = [row.median_ms for row in own if row.median_ms]
        if max(times) > 3 * min(times):  # of less, a logarithmic axis would name no round number
            axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:,g}")
        axes.set_xlabel(curve.axis)
        axes.set_ylabel("forward + backward, ms")
        axes.set_title(f"{curve.title}\n{own[0].device_name}", fontsize=9)
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
        path = folder / f"scaling_{curve.name}_{own[0].device}.png"
        figure.savefig(path, dpi=120)
        written.append(path)
    return written


def main() -> int:
    """Measure the curves (peak memory apart); 1 if one of fastrank's own results is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    plan = RunPlan(seconds=4.0, min_rounds=3, memory=False, products=False)
    plans = [
        (workload, dataclasses.replace(plan, only=curve.variants))
        for curve in CURVES
        for workload in curve.workloads()
    ]
    rows = run_workloads(plans, torch.device("cpu"), options.output / "curves_cpu.csv")
    for path in plot_curves(rows, options.output):
        print(path)
    return 0 if own_is_right(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
