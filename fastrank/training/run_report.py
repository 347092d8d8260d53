"""Reports of a finished run: curves, and a table of metrics before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastrank.training.log_keys import LOG_KEYS

Values = Mapping[str, float]

#: (title, scale of the y axis or its limits, ((log key, label, style), ...)) of each panel.
Panels = Sequence[tuple[str, str | tuple[float, float], Sequence[tuple[str, str, str]]]]

TRAINING_PANELS: Panels = (
    (
        "loss",
        "linear",
        (
            ("loss", "training", "-"),
            ("rank_loss", "ranking term", "--"),
            ("sft_loss", "supervised term", ":"),
            ("eval_loss", "held out", "o-"),
        ),
    ),
    (
        "ranking accuracy",
        (0, 1),
        (
            ("rewards/accuracies", "training batches", "-"),
            ("train_split_rewards/accuracies", "training split", "s--"),
            ("eval_rewards/accuracies", "held out", "o-"),
        ),
    ),
)
ONLINE_PANELS: Panels = (
    ("reward of fresh samples", "linear", (("online/reward", "", "o-"),)),
    ("their perplexity under the reference", "log", (("online/perplexity", "", "o-"),)),
    ("log-ratio to the reference (KL)", "linear", (("online/kl", "", "o-"),)),
    ("live fraction", "linear", (("live_fraction", "", "o-"),)),
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
        for points, label, style in curves:
            if points:
                axis.plot(*zip(*points, strict=True), style, label=label, markersize=3)
        axis.set_xlabel("step")
        axis.set_title(name, fontsize="medium")
        axis.grid(alpha=0.3)
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
