"""Loss and ranking accuracy over the steps of a run, as a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

# (panel title, [(log key, label, style)])
_PANELS = (
    (
        "loss",
        (
            ("loss", "training", "-"),
            ("rank_loss", "ranking term", "--"),
            ("sft_loss", "supervised term", ":"),
            ("eval_loss", "held out", "o-"),
        ),
    ),
    (
        "ranking accuracy",
        (
            ("rewards/accuracies", "training batches", "-"),
            ("train_split_rewards/accuracies", "training split", "s--"),
            ("eval_rewards/accuracies", "held out", "o-"),
        ),
    ),
)


def plot_metrics(rows: Sequence[dict[str, Any]], path: str | Path, title: str) -> Path:
    """Draw the rows of a metrics file; keys that no row has are left out.

    The figure is made without pyplot, so no window system and no global state are involved.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, len(_PANELS))
    for axis, (name, series) in zip(axes, _PANELS, strict=True):
        for key, label, style in series:
            points = [(r["step"], r[key]) for r in rows if isinstance(r.get(key), (int, float))]
            if points:
                axis.plot(*zip(*points, strict=True), style, label=label, markersize=4)
        axis.set_xlabel("step")
        axis.set_title(name)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
    axes[1].set_ylim(0, 1)
    figure.suptitle(title)
    target = Path(path)
    partial = target.with_name(f"{target.stem}.partial{target.suffix}")
    figure.savefig(partial, dpi=120)
    partial.replace(target)
    return target
