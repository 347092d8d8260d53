"""The tables of the README and of the documentation, generated from the recorded CSV files.

    python -m bench.tables            # rewrite the text between the markers
    python -m bench.tables --check    # exit 1 if that would change anything

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``; NAME is one of `TABLES`. What
was not measured is left out, and a workload on which fastrank's own result was wrong shows no
ratio.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from bench.compare import comparison_table
from fastrank.benchmarks.results import (
    FASTRANK,
    OK,
    Measurement,
    columns,
    markdown_table,
    own_is_right,
    read_csv,
)

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
_RENAMED = {"fastrank, paths": "fastrank, segmentwise"}  # of variants, since they were recorded
_MARKED = re.compile(r"(<!-- table: ([^ ]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def _rows(path: Path) -> list[Measurement]:
    rows = read_csv(path, Measurement)
    for row in rows:
        row.variant = _RENAMED.get(row.variant, row.variant)
    return rows


def _suite_table(*workloads: str, path: Path, title: str = "") -> str:
    """Workloads of a suite's CSV file, one table each; those that were measured."""
    rows = _rows(path)
    parts = []
    for workload in workloads:
        own = [row for row in rows if row.workload == workload]
        if own:
            parts.append(_workload_table(own))
    return "\n".join([f"## {title}\n", *parts] if title and parts else parts)


def _brief_table(path: Path) -> str:
    """The times and memory of K5 and S2, fastrank's own other variants left out."""
    lines, about = [], []
    for file, workload in ((path, "K5"), (path.with_name("step_cpu.csv"), "S2")):
        rows = [row for row in _rows(file) if row.workload == workload] if file.exists() else []
        shown = [r for r in rows if r.status == OK and (not r.ours or r.variant == FASTRANK)]
        shown.sort(key=lambda r: (not r.ours, r.median_ms or 0.0))
        cells = columns(shown, own_is_right(rows))
        kept = ("variant", "ms", "time / fastrank's", "peak MiB")
        for values in zip(*(cells.get(name, [""] * len(shown)) for name in kept), strict=True):
            lines.append((workload, *values))
        about += [
            f"{workload}: {r.device_name}; commit {r.commit}, {r.date[:10]}" for r in rows[:1]
        ]
    return f"{markdown_table(['', *kept], lines)}\n{'. '.join(about)}.\n"


def _workload_table(rows: Sequence[Measurement]) -> str:
    """A workload's variants, fastrank first, then by time."""
    first = rows[0]
    timed = sorted(
        (r for r in rows if r.status == OK), key=lambda r: (not r.ours, r.median_ms or 0.0)
    )
    cells = columns(timed, own_is_right(rows))
    text = (
        f"**{first.workload}**: {first.sizes}; {first.device_name}; commit {first.commit}, "
        f"{first.date[:10]}\n\n"
    )
    text += markdown_table(list(cells), zip(*cells.values(), strict=True))
    refused = [f"{row.variant} ({row.status}: {row.reason})" for row in rows if row.status != OK]
    return text + (f"\nWithout a figure: {'; '.join(refused)}.\n" if refused else "")


#: Files with tables.
PAGES = [ROOT / "README.md", ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "workflow.md"]

TABLES: dict[str, tuple[str, Callable[..., str]]] = {
    "brief": ("loss_cpu", _brief_table),
    "k5": ("loss_cpu", partial(_suite_table, "K5", "K5-bf16")),
    "k5-85": ("loss_cpu", partial(_suite_table, "K5-85")),
    "r1": ("rank_cpu", partial(_suite_table, "R1-64x8", "R1-64x8-pro")),
    "a1": ("attention_cpu", partial(_suite_table, "A1-512-cpu", "A1-256-cpu")),
    "s2": ("step_cpu", partial(_suite_table, "S2", "S2-1024", "S2-256")),
    "gpu-loss": (
        "loss_cuda",
        partial(
            _suite_table,
            "K1",
            "K2",
            "K3",
            "K4",
            "K1-85",
            "K1-autocast",
            "K3-softcap",
            "K4-odd",
            title="On a GPU: the fused loss",
        ),
    ),
    "gpu-rank": (
        "rank_cuda",
        partial(
            _suite_table,
            "R1-64x8",
            "R1-512x16",
            "R1-16x64",
            "R1-64x8-pro",
            "R1-64x8x128",
            title="On a GPU: the ranking term",
        ),
    ),
    "gpu-attention": (
        "attention_cuda",
        partial(_suite_table, "A1-2048", "A1-512", "A1-256", title="On a GPU: attention"),
    ),
    "gpu-step": (
        "step_cuda",
        partial(_suite_table, "S1-qwen", "S1-llama", title="On a GPU: a training step"),
    ),
    "compare": ("compare", comparison_table),
    "compare_online": ("compare_online", comparison_table),
}
"""By name: the file of recorded rows, and a function of its ``path`` that gives the Markdown."""


def fill(text: str, results: Path = RESULTS) -> str:
    """``text`` with every marked table made anew.

    Raises:
        ValueError: a marker names no table, or has no end.
    """
    starts = text.count("<!-- table:")
    filled, count = _MARKED.subn(lambda m: m[1] + make(m[2], results) + m[3], text)
    if count != starts:
        raise ValueError(f"expected an <!-- end --> for each of {starts} tables, got {count}")
    return filled


def make(name: str, results: Path = RESULTS) -> str:
    """One table as Markdown."""
    if name not in TABLES:
        raise ValueError(f"table must be one of {', '.join(TABLES)}, got {name}")
    file, render = TABLES[name]
    path = results / f"{file}.csv"
    return render(path=path) if path.exists() else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--file", type=Path, action="append", help="by default the pages with tables"
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--check", action="store_true", help="only say whether it is up to date")
    options = parser.parse_args()
    stale = 0
    for file in options.file or PAGES:
        before = file.read_text(encoding="utf-8")
        try:
            after = fill(before, options.results)
        except ValueError as error:
            print(f"{file}: {error}", file=sys.stderr)
            return 1
        if options.check and after != before:
            print(f"{file}: tables differ from {options.results}; run bench.tables")
        elif not options.check:
            file.write_text(after, encoding="utf-8")
        stale += after != before
    return int(options.check and stale > 0)


if __name__ == "__main__":
    sys.exit(main())
