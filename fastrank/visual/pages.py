"""``report.html`` of a run, and a page of a data file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastrank.errors import InputError
from fastrank.visual.html import escape, table, write_page
from fastrank.visual.shown_groups import FILE, MOST, ShownGroup, groups_section, read_groups
from fastrank.visual.svg import histogram, line_chart

REPORT = "report.html"
#: What the splits of a run are called, by the prefix of their log keys.
SPLIT_TITLES = {"eval": "held out", "train_split": "training split"}
_SPLITS = (("training batches", "a", ""), ("training split", "c", "train_split_"),
           ("held out", "b", "eval_"))  # fmt: skip
_BINS = 24


def write_run_report(
    folder: str | Path, rows: Sequence[Mapping[str, Any]], target: Path | None = None
) -> Path:
    """Write ``report.html`` into a run's folder, or to ``target``.

    Args:
        folder: of a run, with what it wrote: ``summary.json``, ``held_out.jsonl``.
        rows: of its ``metrics.jsonl``.

    Raises:
        InputError: a file of the folder is damaged.
    """
    folder = Path(folder)
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        groups = read_groups(folder / FILE)
    except FileNotFoundError:  # a run that goes on
        summary, groups = {}, read_groups(folder / FILE)
    except (ValueError, TypeError, OSError) as error:
        raise InputError(f"{folder}: its summary or {FILE} cannot be read: {error}") from error
    about = summary.get("about", {})
    body = [
        f'<p class="soft">{escape(str(k))}: {escape(str(v))}</p>'
        for k, v in about.items()
        if k != "run"
    ]
    body += _before_and_after(summary)
    body += ["<h2>Curves</h2>", f'<div class="charts">{"".join(_charts(rows))}</div>']
    rewards = summary.get("rewards")
    if rewards:
        sets = [(name, colour, rewards["counts"].get(name, [])) for name, colour in
                (("training", "a"), ("held out", "b"))]  # fmt: skip
        chart = histogram("candidates by reward", rewards["edges"], sets)
        body += ["<h2>Rewards</h2>", f'<div class="charts">{chart}</div>']
    if groups:
        body += ["<h2>Held-out prompts</h2>",
                 '<p class="soft">Candidates in the model\'s order, the likeliest first; green is '
                 "the highest reward of the prompt, red the lowest.</p>"]  # fmt: skip
        body += groups_section(groups)
    return write_page(target or folder / REPORT, str(about.get("run", folder.name)), body)


def write_data_page(
    path: str | Path, name: str, groups: Sequence[ShownGroup], total: int, dropped: str
) -> Path:
    """Write a page of a data file's groups.

    Args:
        path: of the page.
        name: of the data.
        groups: those that are shown.
        total: number of groups in the data.
        dropped: what reading says of the data.
    """
    rewards = [r for group in groups for r in group.rewards if r is not None]
    body = [f'<p class="soft">{len(groups)} of {total:,} prompts, evenly spread</p>',
            f'<pre class="soft">{escape(dropped)}</pre>']  # fmt: skip
    if rewards:
        edges, counts = reward_bins({"candidates": rewards})
        sizes = [len(group.responses) for group in groups]
        wide = [float(n) for n in range(min(sizes), max(sizes) + 2)]
        number = [sizes.count(int(n)) for n in wide[:-1]]
        charts = [
            histogram("candidates shown, by reward", edges, [("", "a", counts["candidates"])]),
            histogram("prompts shown, by number of candidates", wide, [("", "b", number)]),
        ]
        body.append(f'<div class="charts">{"".join(charts)}</div>')
    body += ["<h2>Prompts</h2>", *groups_section(groups)]
    return write_page(path, name, body)


def reward_bins(sets: Mapping[str, Sequence[float]]) -> tuple[list[float], dict[str, list[int]]]:
    """Common edges, and the counts between them of each set of numbers."""
    values = [value for own in sets.values() for value in own]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if low == high:
        low, high = low - 0.5, high + 0.5
    edges = [low + (high - low) * i / _BINS for i in range(_BINS + 1)]
    counts = {name: [0] * _BINS for name in sets}
    for name, own in sets.items():
        for value in own:
            counts[name][min(int((value - low) / (high - low) * _BINS), _BINS - 1)] += 1
    return edges, counts


def _before_and_after(summary: Mapping[str, Any]) -> list[str]:
    after = summary.get("after") or {}
    before = summary.get("before") or {}
    keys = list(dict.fromkeys(key for values in after.values() for key in values))
    if not keys:
        return []
    header = [""]
    for name in after:
        header += [f"{SPLIT_TITLES.get(name, name)}: before", "after"]
    rows = []
    for key in keys:
        cells = [(before.get(name) or {}).get(key) for name in after]
        pairs = zip(cells, (after[name].get(key) for name in after), strict=True)
        rows.append([key, *(_number(value) for pair in pairs for value in pair)])
    return ["<h2>Before and after</h2>", table(header, rows)]


def _charts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    panels = (
        ("loss", "loss", None),
        ("ranking term", "rank_loss", None),
        ("ranking accuracy: share of the pairs in order", "rewards/accuracies", (0.0, 1.0)),
        ("score of the best candidate minus the others", "rewards/margins", None),
    )
    return [
        line_chart(title, [(label, colour, points(rows, prefix + key)) for label, colour, prefix in
                           _SPLITS], limits=limits)
        for title, key, limits in panels
    ]  # fmt: skip


def points(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """Steps and values of a log key."""
    return [(row["step"], row[key]) for row in rows if isinstance(row.get(key), (int, float))]


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, (int, float)) else "–"


__all__ = ["MOST", "REPORT", "points", "reward_bins", "write_data_page", "write_run_report"]
