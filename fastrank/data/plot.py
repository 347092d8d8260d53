"""What is in a record file, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastrank.data.lengths import Lengths
from fastrank.data.report import Report
from fastrank.data.write import atomic_path


def plot_file(
    path: str | Path, report: Report, rewards: Sequence[float], lengths: Lengths | None
) -> None:
    """Write a PNG: groups by number of candidates, rewards, and, if known, lengths in tokens."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = 2 if lengths is None else 3
    figure = Figure(figsize=(4.5 * panels, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels)

    sizes = report.candidates_per_group
    axes[0].bar(list(sizes), list(sizes.values()))
    axes[0].set(xlabel="candidates of a prompt", ylabel="prompts", title="Groups")
    axes[1].hist(list(rewards), bins=40)
    axes[1].set(xlabel="reward", ylabel="responses", title="Rewards")
    if lengths is not None:
        axes[2].hist(
            [list(lengths.prompts), list(lengths.responses)],
            bins=40,
            label=["prompts", "responses"],
        )
        axes[2].set(xlabel="tokens", ylabel="count", title="Lengths before truncation")
        axes[2].legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
