"""The README's tables, generated from the recorded CSV files.

    python bench/tables.py            # rewrite what stands between the markers
    python bench/tables.py --check    # exit 1 if that would change anything

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``; NAME is one of `TABLES`. What
was not measured says so, and a workload on which fastrank's own result was wrong shows no ratio.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fastrank.benchmarks.report import read_csv
from fastrank.benchmarks.runner import OK, Row, own_is_right

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
_MARKED = re.compile(r"(<!-- table: ([^ ]+) -->\n).*?(<!-- end -->)", re.DOTALL)


class Table(NamedTuple):
    """Which rows of which file, under what heading."""

    file: str
    workloads: tuple[str, ...]


TABLES = {
    "k5": Table("loss_cpu", ("K5", "K5-bf16")),
    "k5-85": Table("loss_cpu", ("K5-85",)),
    "r1": Table("rank_cpu", ("R1-64x8", "R1-64x8-pro")),
    "a1": Table("attention_cpu", ("A1-512-cpu", "A1-256-cpu")),
    "s2": Table("step_cpu", ("S2", "S2-1024", "S2-256")),
    "gpu-loss": Table("loss_cuda", ("K1", "K2", "K3", "K4")),
    "gpu-rank": Table("rank_cuda", ("R1-64x8", "R1-512x16", "R1-16x64", "R1-64x8-pro")),
    "gpu-attention": Table("attention_cuda", ("A1-2048", "A1-512", "A1-256")),
    "gpu-step": Table("step_cuda", ("S1-qwen", "S1-llama")),
}


def render(text: str, results: Path = RESULTS) -> str:
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
    path = results / f"{TABLES[name].file}.csv"
    if not path.exists():
        return "Not measured yet.\n"
    rows = read_csv(path)
    parts = []
    for workload in TABLES[name].workloads:
        own = [row for row in rows if row.workload == workload]
        parts.append(_one(own) if own else f"{workload}: not measured.\n")
    return "\n".join(parts)


def _one(rows: Sequence[Row]) -> str:
    """A workload's variants, fastrank first, then by time."""
    first = rows[0]
    timed = sorted(
        (r for r in rows if r.status == OK), key=lambda r: (not r.ours, r.median_ms or 0.0)
    )
    columns = _columns(timed, own_is_right(rows))
    lines = [
        f"**{first.workload}**: {first.sizes}; {first.device_name}; commit {first.commit}, "
        f"{first.date[:10]}",
        "",
        "| " + " | ".join(["variant", *columns]) + " |",
        "| --- |" + " ---: |" * len(columns),
    ]
    lines += [
        "| " + " | ".join([row.variant, *(cells[i] for cells in columns.values())]) + " |"
        for i, row in enumerate(timed)
    ]
    refused = [f"{row.variant} ({row.status}: {row.reason})" for row in rows if row.status != OK]
    if refused:
        lines += ["", "Without a figure: " + "; ".join(refused) + "."]
    return "\n".join([*lines, ""])


def _columns(rows: Sequence[Row], comparable: bool) -> dict[str, list[str]]:
    """The columns that any row fills."""
    columns = {
        "ms": [_number(r.median_ms) for r in rows],
        "spread": ["" if r.spread is None else f"{r.spread:.0%}" for r in rows],
        "time / fastrank's": [
            "" if r.ratio is None or not comparable else f"{r.ratio:.2f}" for r in rows
        ],
        "peak MiB": [_number(r.peak_mib) for r in rows],
        "saved MiB": [_number(r.saved_mib) for r in rows],
        "products": ["" if r.products is None else f"{r.products:.2f}" for r in rows],
        "of the floor": ["" if r.floor_share is None else f"{r.floor_share:.0%}" for r in rows],
        "error": ["" if r.error is None else f"{r.error:.0e}" for r in rows],
    }
    return {name: cells for name, cells in columns.items() if any(cells)}


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--file", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--check", action="store_true", help="only say whether it is up to date")
    options = parser.parse_args()
    before = options.file.read_text(encoding="utf-8")
    try:
        after = render(before, options.results)
    except ValueError as error:
        print(f"{options.file}: {error}", file=sys.stderr)
        return 1
    if options.check:
        if after != before:
            print(f"{options.file}: tables differ from {options.results}; run bench/tables.py")
        return int(after != before)
    options.file.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
