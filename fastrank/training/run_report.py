"""Reports of a finished run: curves, and a table of metrics before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastrank.training.log_keys import LOG_KEYS

Values = Mapping[str, float]

#: (title, scale of the y axis or its limits, ((log key, label, colour), ...)) of each panel.
Panels = Sequence[tuple[str, str | tuple[float, float], Sequence[tuple[str, str, str]]]]

_SPLITS = (
    ("", "training batches", "C0"),
    ("train_split_", "training split", "C2"),
    ("eval_", "held out", "C1"),
)
TRAINING_PANELS: Panels = [
    (title, scale, [(prefix + key, label, colour) for prefix, label, colour in _SPLITS])
    for title, scale, key in (
        ("loss", "linear", "loss"),
        ("ranking term alone", "linear", "rank_loss"),
        ("ranking accuracy", (0, 1), "rewards/accuracies"),
    )
]
ONLINE_PANELS: Panels = (
    ("reward of fresh samples", "linear", (("online/reward", "", "C0"),)),
    ("their perplexity under the reference", "log", (("online/perplexity", "", "C0"),)),
    ("log-ratio to the reference (KL)", "linear", (("online/kl", "", "C0"),)),
    ("live fraction", "linear", (("live_fraction", "", "C0"),)),
)


def plot_metrics(
    rows: Sequence[Mapping[str, Any]],
    path: str | Path,
    title: str = "",
    panels: Panels = TRAINING_PANELS,
) -> Path:
    """Draw the rows of a metrics file over their steps; keys that no row has are left out, and
    panels without any.

    The figure is made without pyplot, so no window system and no global state are involved.
    """
    from matplotlib.figure import Figure

    drawn = []
    for name, scale, series in panels:
        curves = [
            ([(r["step"], r[key]) for r in rows if isinstance(r.get(key), (int, float))], *look)
            for key, *look in series
        ]
        if any(points for points, *_ in curves):
            drawn.append((name, scale, curves))
    figure = Figure(figsize=(4.2 * max(len(drawn), 1), 3.8), layout="constrained")
    for number, (name, scale, curves) in enumerate(drawn, start=1):
        axis = figure.add_subplot(1, len(drawn), number)
        for points, label, colour in curves:
            if points:  # what is known at the start and the end alone makes no line
                style = "o" if len(points) < 3 else "o-" if len(points) <= 30 else "-"
                axis.plot(*zip(*points, strict=True), style, c=colour, label=label, markersize=3.5)
        axis.set_xlabel("step")
        axis.set_title(name, fontsize="medium")
        axis.grid(alpha=0.3)
        axis.margins(x=0.03)
        if isinstance(scale, str):
            axis.set_yscale(scale)
        else:
            axis.set_ylim(*scale)
        if any(label for _, label, _ in curves):
            axis.legend()
    figure.suptitle(title)
    target = Path(path)
    partial = target.with_name(f"{target.stem}.partial{target.suffix}")
    figure.savefig(partial, dpi=120)
    partial.replace(target)
    return target


def summary_table(splits: Mapping[str, tuple[Values | None, Values]]) -> str:
    """Rows of metrics, two columns per split; a split's first values may be unknown (None).

    >>> print(summary_table({"held out": ({"loss": 2.0}, {"loss": 0.5})}))
                         held out
                         before    after
    loss                  2.0000   0.5000
    """
    shown = [key.name for key in LOG_KEYS if key.of in ("both", "evaluation")]
    label = max(map(len, shown))
    header = [" " * label, " " * label]
    for name in splits:
        header[0] += f"  {name:<16}"
        header[1] += f"  {'before':<6}   {'after':>6}"
    lines = [header[0].rstrip(), header[1].rstrip()]
    for key in shown:
        cells = [
            (_number(None if before is None else before.get(key)), _number(after.get(key)))
            for before, after in splits.values()
        ]
        if any(value.strip() != "-" for pair in cells for value in pair):
            lines.append(f"{key:<{label}}" + "".join(f"  {a}  {b}" for a, b in cells))
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return f"{'-':>7}" if value is None else f"{value:7.4f}"
