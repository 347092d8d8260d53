"""Curves of an online run: reward, perplexity, distance from the reference, live fraction."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

#: (panel title, log key, logarithmic)
_PANELS = (
    ("reward of fresh samples", "online/reward", False),
    ("their perplexity under the reference", "online/perplexity", True),
    ("log-ratio to the reference (KL)", "online/kl", False),
    ("live fraction", "live_fraction", False),
)


def plot_online(rows: Sequence[dict[str, Any]], path: str | Path) -> Path:
    """Draw the rows of a metrics file; a panel whose key no row has is left out."""
    from matplotlib.figure import Figure

    series = []
    for title, key, logarithmic in _PANELS:
        points = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), (int, float))]
        if points:
            series.append((title, logarithmic, points))
    figure = Figure(figsize=(3.6 * max(len(series), 1), 3.4), layout="constrained")
    if series:
        for axis, (title, logarithmic, points) in zip(
            figure.subplots(1, len(series), squeeze=False)[0], series, strict=True
        ):
            axis.plot(*zip(*points, strict=True), "o-", markersize=3)
            axis.set_title(title, fontsize="medium")
            axis.set_xlabel("step")
            axis.grid(alpha=0.3)
            if logarithmic:
                axis.set_yscale("log")
    target = Path(path)
    partial = target.with_name(f"{target.stem}.partial{target.suffix}")
    figure.savefig(partial, dpi=120)
    partial.replace(target)
    return target
