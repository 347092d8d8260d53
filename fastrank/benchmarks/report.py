"""Rows as CSV files, and as a table that a person reads."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .runner import FASTRANK, OK, Row, own_is_right

FIELDS = [field.name for field in dataclasses.fields(Row)]
_HEADER = ("variant", "ms", "±", "x fastrank", "MiB", "saved", "products", "floor", "error")


def write_csv(rows: Iterable[Row], path: Path) -> None:
    """Write rows; replaces the file when it is complete."""
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        for row in rows:
            fields = dataclasses.asdict(row)
            writer.writerow({name: _cell(value) for name, value in fields.items()})
    partial.replace(path)


def read_csv(path: Path) -> list[Row]:
    """The rows of a file that `write_csv` wrote."""
    kinds = {field.name: str(field.type) for field in dataclasses.fields(Row)}
    with path.open(newline="", encoding="utf-8") as file:
        return [
            Row(**{name: _value(text, kinds[name]) for name, text in line.items()})
            for line in csv.DictReader(file)
        ]


def table(rows: Sequence[Row]) -> str:
    """The rows of one workload, aligned; refusals with their reasons below."""
    comparable = own_is_right(rows)
    lines: list[tuple[str, ...]] = [_HEADER]
    for row in rows:
        if row.status == OK:
            ratio = "" if not comparable or row.ratio is None else f"{row.ratio:.2f}"
            lines.append(
                (
                    row.variant,
                    _number(row.median_ms),
                    "" if row.spread is None else f"{row.spread:.0%}",
                    ratio,
                    _number(row.peak_mib),
                    _number(row.saved_mib),
                    "" if row.products is None else f"{row.products:.2f}",
                    "" if row.floor_share is None else f"{row.floor_share:.0%}",
                    "" if row.error is None else f"{row.error:.1e}",
                )
            )
    # A column that no row fills is left out.
    used = [i for i in range(len(_HEADER)) if any(line[i] for line in lines[1:])] or [0]
    lines = [tuple(line[i] for i in used) for line in lines]
    widths = [max(len(line[i]) for line in lines) for i in range(len(used))]
    text = []
    if rows:
        text.append(f"{rows[0].workload}: {rows[0].sizes} on {rows[0].device_name}")
    for line in lines:
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        text.append("  " + "  ".join(cells).rstrip())
    for row in rows:
        if row.status != OK:
            text.append(f"  {row.status}: {row.variant}: {row.reason}")
    if not comparable:
        text.append(f"  {FASTRANK}'s own results are wrong: nothing is compared with them")
    return "\n".join(text)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else value


def _value(text: str, kind: str) -> Any:
    if text == "" and "None" in kind:
        return None
    if kind == "bool":
        return text == "True"
    base = kind.split(" ")[0]
    return {"int": int, "float": float, "str": str}[base](text)
