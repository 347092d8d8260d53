"""Scaling curves: one size goes up, everything else stays.

The sizes are what two CPU cores can sweep in minutes: the model of the step curves has 4 layers of
width 128 and 8,192 vocabulary entries, and the vocabulary curve takes 256 tokens of width 128. What
the curves are for is their shape, which depends on ratios of lengths. The last curve looks for the
prompt length from which sharing pays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .runner import OK, Row, own_is_right, run_workload
from .workloads import Workload

_STEP_PEERS = ("no sharing, padding-free", "dense mask", "padded, responses projected")


@dataclass(frozen=True)
class Curve:
    """``field`` of ``base`` takes the ``values``; ``variants`` are drawn."""

    name: str
    title: str
    field: str
    base: Workload
    values: tuple[int, ...]
    variants: tuple[str, ...]

    def workloads(self) -> list[Workload]:
        """One a value."""
        made = []
        for value in self.values:
            change: dict[str, Any] = {"name": f"{self.name}={value}", self.field: value}
            made.append(dataclasses.replace(self.base, **change))
        return made


_STEP = Workload("", "step", ("cpu",), 1, 8, 64, 256, model="llama-4x128")
_LOSS = Workload("", "loss", ("cpu",), 1, 4, 64, vocab=32000, hidden=128)
_OURS = "fastrank"
CURVES = [
    Curve("n", "candidates n (P 256, R 64)", "candidates", _STEP, (2, 4, 8, 16, 32, 64),
          (_OURS, *_STEP_PEERS, "published loop")),
    Curve("P", "prompt tokens P (n 4, R 64)", "prompt", dataclasses.replace(_STEP, candidates=4),
          (64, 256, 1024, 4096), (_OURS, *_STEP_PEERS, "published loop")),
    Curve("R", "response tokens R (n 4, P 256)", "response",
          dataclasses.replace(_STEP, candidates=4), (32, 128, 512, 1024),
          (_OURS, *_STEP_PEERS, "published loop")),
    Curve("V", "vocabulary V (T 256, D 128)", "vocab", _LOSS, (32768, 65536, 131072, 262144),
          (_OURS, "plain PyTorch", "F.linear_cross_entropy", "liger scaled CE, generic",
           "TRL ChunkedLogProb")),
    Curve("crossover", "prompt tokens P (n 4, R 256)", "prompt",
          dataclasses.replace(_STEP, candidates=4, response=256), (4, 8, 16, 32, 64),
          (_OURS, "fastrank, padded rows", "fastrank, layout by auto")),
]  # fmt: skip


def run_curves(
    device: torch.device,
    *,
    names: list[str] | None = None,
    seconds: float = 4.0,
    points: int | None = None,
    tick: Callable[[str], None] = lambda what: None,
) -> list[Row]:
    """Measure the curves (peak memory apart). ``points`` keeps only the first ones of each,
    for a dry run."""
    rows: list[Row] = []
    for curve in CURVES:
        if names is not None and curve.name not in names:
            continue
        for workload in curve.workloads()[:points]:
            rows += run_workload(
                workload,
                device,
                seconds=seconds,
                min_rounds=3,
                only=curve.variants,
                with_memory=False,
                with_products=False,
                tick=lambda what, name=workload.name: tick(f"{name}: {what}"),  # type: ignore[misc]
            )
    return rows


def plot_curves(rows: list[Row], folder: Path) -> list[Path]:
    """One PNG a curve: milliseconds over the size, both logarithmic. A curve on which one of
    fastrank's own results was wrong is not drawn."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    written = []
    for curve in CURVES:
        own = [row for row in rows if row.workload.startswith(f"{curve.name}=")]
        if not own or not own_is_right(own):
            continue
        figure, axes = pyplot.subplots(figsize=(6.4, 4.2))
        for variant in curve.variants:
            points = [row for row in own if row.variant == variant and row.status == OK]
            if points:
                x = [int(row.workload.split("=")[1]) for row in points]
                y = [row.median_ms or float("nan") for row in points]
                width = 2 if variant.startswith(_OURS) else 1
                axes.plot(x, y, marker="o", label=variant, linewidth=width)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel(curve.title)
        axes.set_ylabel("forward + backward, ms")
        axes.set_title(own[0].device_name, fontsize=9)
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
        figure.tight_layout()
        path = folder / f"scaling_{curve.name}_{own[0].device}.png"
        figure.savefig(path, dpi=120)
        pyplot.close(figure)
        written.append(path)
    return written
