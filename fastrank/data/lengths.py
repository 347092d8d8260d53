"""Token counts of a file: quantiles, and the cost of padding, packing and sharing prompts.

Lengths are those of the records themselves; the token totals are of what is left after truncation,
which is what a model would compute. The pack fill is of the whole file packed at once, the best
that a training run, which packs one step's groups at a time, can come to.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastrank.data.report import Report
from fastrank.data.write import atomic_path

QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)


class Lengths:
    """Collects one record at a time; holds four bytes per response, no tokens."""

    def __init__(self) -> None:
        self.prompts = array("i")
        self.responses = array("i")
        self.sequences = array("i")
        self._shared: list[int] = []
        self._separate = 0
        self._padded = 0

    def add(
        self,
        prompt: int,
        responses: Sequence[int],
        cut_prompt: int,
        cut_responses: Sequence[int],
    ) -> None:
        """One record's lengths in tokens, before and after truncation."""
        self.prompts.append(prompt)
        self.responses.extend(responses)
        self.sequences.extend(prompt + response for response in responses)
        n = len(cut_responses)
        self._shared.append(cut_prompt + sum(cut_responses))
        self._separate += n * cut_prompt + sum(cut_responses)
        self._padded += n * (cut_prompt + max(cut_responses))

    def summary(self, max_tokens: int) -> dict[str, Any]:
        """Quantiles, token totals and packs of at most ``max_tokens``, as JSON types.

        ``lengths.together`` is of a prompt with one response, what the context has to hold.
        ``tokens.padded`` is every prompt's candidates padded to the longest of them,
        ``tokens.packed`` the same without padding, ``tokens.shared`` with every prompt encoded
        once; the savings are shares of ``padded``.
        """
        from fastrank.data.bins import best_fit

        shared = sum(self._shared)
        fitting = [size for size in self._shared if size <= max_tokens]
        packs = best_fit(fitting, max_tokens) if fitting else []
        filled = sum(fitting) / (len(packs) * max_tokens) if packs else 0.0
        return {
            "lengths": {
                "prompt": _quantiles(self.prompts),
                "response": _quantiles(self.responses),
                "together": _quantiles(self.sequences),
            },
            "tokens": {
                "padded": self._padded,
                "packed": self._separate,
                "shared": shared,
                "saved_by_packing": _share(self._padded - self._separate, self._padded),
                "saved_by_sharing": _share(self._padded - shared, self._padded),
            },
            "packs": {
                "max_tokens": max_tokens,
                "count": len(packs),
                "fill": filled,
                "groups_too_large": len(self._shared) - len(fitting),
            },
        }


def _quantiles(lengths: array[int]) -> dict[str, float]:
    import numpy as np

    values = np.quantile(np.asarray(lengths), QUANTILES)
    return {f"{q:.0%}": float(value) for q, value in zip(QUANTILES, values, strict=True)}


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def as_text(summary: dict[str, Any]) -> str:
    """The result of `Lengths.summary` for a person."""
    names = list(next(iter(summary["lengths"].values())))
    headings = ["min", *names[1:-1], "max"]
    lines = ["  tokens".ljust(21) + "".join(f"{heading:>8}" for heading in headings)]
    for what, values in summary["lengths"].items():
        lines.append(f"    {what}".ljust(21) + "".join(f"{values[name]:8.0f}" for name in names))
    tokens, packs = summary["tokens"], summary["packs"]
    lines += [
        f"  padded      {tokens['padded']:,} tokens",
        f"  packed      {tokens['packed']:,} tokens ({tokens['saved_by_packing']:.1%} saved)",
        f"  shared      {tokens['shared']:,} tokens ({tokens['saved_by_sharing']:.1%} saved)",
        f"  packs       {packs['count']} of {packs['max_tokens']:,} tokens,"
        f" {packs['fill']:.1%} full",
    ]
    if packs["groups_too_large"]:
        lines.append(f"    {packs['groups_too_large']} groups are larger than a pack")
    return "\n".join(lines)


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
