"""Rows of a comparison as a CSV file, a Markdown table, a plot, and the claims they bear out."""

from __future__ import annotations

import csv
import dataclasses
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Row:
    """One method with one seed, on held-out prompts.

    Attributes:
        method, seed: what was run.
        reward: mean reward of fresh samples; ``standard_error`` over the prompts.
        perplexity: of the fresh samples under the base model.
        accuracy: pairwise ranking accuracy on held-out candidates of the base model.
        train_seconds: wall-clock time of training.
    """

    method: str
    seed: int
    reward: float
    standard_error: float
    perplexity: float
    accuracy: float
    train_seconds: float


def write_csv(rows: Sequence[Row], path: Path, about: dict[str, Any]) -> None:
    """One line a row, with what it was measured on."""
    fields = [field.name for field in dataclasses.fields(Row)]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*fields, *about])
        writer.writeheader()
        for row in rows:
            writer.writerow({**dataclasses.asdict(row), **about})


def read_csv(path: Path) -> list[Row]:
    """The rows that `write_csv` wrote."""
    kinds = {"method": str, "seed": int}
    names = [field.name for field in dataclasses.fields(Row)]
    with path.open(newline="", encoding="utf-8") as file:
        return [
            Row(**{name: kinds.get(name, float)(line[name]) for name in names})
            for line in csv.DictReader(file)
        ]


def provenance(path: Path) -> str:
    """One line: what the rows of a file were measured on, as its first row says."""
    with path.open(newline="", encoding="utf-8") as file:
        first = next(csv.DictReader(file))
    return (
        f"Base model {first['model']}; {first['prompts']} prompts with {first['samples']} samples "
        f"of {first['tokens']} tokens, {first['heldout']} prompts held out; mean ± standard "
        f"deviation between seeds; {first['device_name']}; commit {first['commit']}, "
        f"{first['date'][:10]}."
    )


def fill(text: str, name: str, table: str) -> str:
    """``text`` with ``table`` between ``<!-- NAME -->`` and ``<!-- /NAME -->``.

    Raises:
        ValueError: there is no such pair of markers.
    """
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"expected {begin.strip()} and {end} in the file, got none")
    return f"{before}{begin}{table}{end}{after}"


def by_method(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by method, in the order of their first row."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.method, []).append(row)
    return found


def mean_of(rows: Sequence[Row], name: str) -> float:
    return statistics.fmean(getattr(row, name) for row in rows)


def markdown_table(rows: Sequence[Row]) -> str:
    """Means over the seeds, ± the standard deviation between seeds."""
    lines = [
        "| method | reward | perplexity | ranking accuracy |",
        "| --- | ---: | ---: | ---: |",
    ]
    for method, found in by_method(rows).items():
        cells = [
            method,
            _with_spread(found, "reward", 2),
            _with_spread(found, "perplexity", 1),
            _with_spread(found, "accuracy", 3),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _with_spread(rows: Sequence[Row], name: str, digits: int) -> str:
    values = [getattr(row, name) for row in rows]
    mean = statistics.fmean(values)
    if mean >= 100:
        digits = 0
    if len(values) < 2:
        return f"{mean:.{digits}f}"
    spread = statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan
    return f"{mean:.{digits}f} ± {spread:.{digits}f}"


def claims(rows: Sequence[Row]) -> list[tuple[str, bool]]:
    """What the comparison is meant to show, and whether these rows do; those without their
    methods are left out."""
    found = by_method(rows)
    reward = {method: mean_of(own, "reward") for method, own in found.items()}
    perplexity = {method: mean_of(own, "perplexity") for method, own in found.items()}
    checks = [
        (
            "RRHF at least triples the base model's reward",
            ("base model", "RRHF"),
            lambda base, rrhf: reward[rrhf] >= 3 * reward[base],
        ),
        (
            "RRHF beats SFT on the best",
            ("SFT on the best", "RRHF"),
            lambda sft, rrhf: reward[rrhf] > reward[sft],
        ),
        (
            "without its SFT term the perplexity is at least ten times as high",
            ("RRHF", "RRHF without SFT"),
            lambda rrhf, without: perplexity[without] >= 10 * perplexity[rrhf],
        ),
    ]
    return [
        (claim, check(*methods))
        for claim, methods, check in checks
        if all(method in found for method in methods)
    ]


def plot(rows: Sequence[Row], path: Path) -> None:
    """Reward over perplexity, one point a seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for method, found in by_method(rows).items():
        axes.scatter([row.perplexity for row in found], [row.reward for row in found], label=method)
    axes.set_xscale("log")
    axes.set_xlabel("perplexity of fresh samples under the base model (log scale)")
    axes.set_ylabel("mean reward of fresh samples")
    axes.legend(fontsize="small")
    axes.set_title("Held-out prompts, one point a seed")
    figure.savefig(path, dpi=150)
