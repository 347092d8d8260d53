"""Measurements: one row per variant and workload, their CSV files and tables.

One pair of functions reads and writes every CSV file of a benchmark, from the fields of a
dataclass; one set of columns serves the terminal and the README.
"""

from __future__ import annotations

import csv
import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from fastrank.console import say

FASTRANK = "fastrank"
#: What plain PyTorch does, of each suite: the first that was timed is compared with fastrank.
PLAIN = ("plain PyTorch", "padded, responses projected", "dense mask", "no sharing")
OK, WRONG, FAILED, MISSING = "ok", "wrong", "failed", "not run"

Record = TypeVar("Record")


@dataclass
class Measurement:
    """One variant on one workload: a row of the CSV. Times are of one run, in milliseconds."""

    suite: str
    workload: str
    sizes: str
    device: str
    dtype: str
    tokens: int
    groups: int
    candidates: int
    response: int
    prompt: int
    vocab: int
    hidden: int
    loss: str
    variant: str
    ours: bool
    status: str = OK
    reason: str = ""
    error: float | None = None
    errors: str = ""
    median_ms: float | None = None
    spread: float | None = None
    queued_ms: float | None = None
    """fastrank on a GPU: median while the device is still busy when the run begins, so that the
    host's work is hidden; the others begin on an idle device."""
    ratio: float | None = None
    """Median over fastrank's median, in the same run."""
    peak_mib: float | None = None
    saved_mib: float | None = None
    """Step suite on a CPU: tensors that autograd keeps for the backward pass, parameters apart."""
    products: float | None = None
    floor_ms: float | None = None
    """Median of the vendor's products that the workload needs, in the same run."""
    floor_share: float | None = None
    """``floor_ms`` over this median."""
    traffic_ms: float | None = None
    """Bytes that must move besides over the measured copy bandwidth."""
    samples_ms: str = ""
    device_name: str = ""
    threads: str = ""
    versions: str = ""
    commit: str = ""
    date: str = ""

    @property
    def timed(self) -> bool:
        return self.median_ms is not None


def own_is_right(rows: Sequence[Measurement]) -> bool:
    """Whether none of fastrank's own variants is wrong or failed."""
    return not any(row.ours and row.status in (WRONG, FAILED) for row in rows)


# ---- CSV -----------------------------------------------------------------------------------------


def write_csv(rows: Iterable[Any], path: Path, about: Mapping[str, Any] | None = None) -> None:
    """Write dataclasses of one kind, each followed by the columns of ``about``; replaces the file
    when it is complete."""
    lines = [{**dataclasses.asdict(row), **(about or {})} for row in rows]
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]) if lines else [])
        writer.writeheader()
        for line in lines:
            cells = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in line.items()}
            writer.writerow(cells)
    partial.replace(path)


def read_csv(path: Path, kind: type[Record]) -> list[Record]:
    """The rows of a file that `write_csv` wrote from dataclasses of this kind; columns that are no
    field of it are left out, and fields that are no column yet have their defaults."""
    kinds = get_type_hints(kind)
    with path.open(newline="", encoding="utf-8") as file:
        return [
            kind(**{name: _parse(line[name], kinds[name]) for name in kinds if name in line})
            for line in csv.DictReader(file)
        ]


def _parse(text: str, kind: Any) -> Any:
    if type(None) in get_args(kind):
        return None if text == "" else _parse(text, get_args(kind)[0])
    return text == "True" if kind is bool else kind(text)


# ---- tables --------------------------------------------------------------------------------------


def columns(rows: Sequence[Measurement], comparable: bool) -> dict[str, list[str]]:
    """The columns that any row fills, one cell per row; without a ratio if nothing can be compared
    with fastrank."""
    cells = {
        "variant": [row.variant for row in rows],
        "ms": [_number(row.median_ms) for row in rows],
        "ms, queued": [_number(row.queued_ms) for row in rows],
        "spread": [_formatted(row.spread, ".0%") for row in rows],
        "time / fastrank's": [_formatted(row.ratio if comparable else None, ".2f") for row in rows],
        "peak MiB": [_number(row.peak_mib) for row in rows],
        "saved MiB": [_number(row.saved_mib) for row in rows],
        "products": [_formatted(row.products, ".2f") for row in rows],
        "of the floor": [_formatted(row.floor_share, ".0%") for row in rows],
        "error": [_formatted(row.error, ".0e") for row in rows],
    }
    return {name: cell for name, cell in cells.items() if name == "variant" or any(cell)}


def text_table(rows: Sequence[Measurement]) -> str:
    """The rows of one workload, aligned; refusals with their reasons below."""
    comparable = own_is_right(rows)
    aligned = []
    for name, cells in columns([row for row in rows if row.status == OK], comparable).items():
        width = max(map(len, [name, *cells]))
        align = str.ljust if name == "variant" else str.rjust
        aligned.append([align(cell, width) for cell in (name, *cells)])
    text = [f"{row.workload}: {row.sizes} on {row.device_name}" for row in rows[:1]]
    text += ["  " + "  ".join(line).rstrip() for line in zip(*aligned, strict=True)]
    text += [f"  {r.status}: {r.variant}: {r.reason}" for r in rows if r.status != OK]
    if not comparable:
        text.append(f"  {FASTRANK}'s own results are wrong: nothing is compared with them")
    return "\n".join(text)


def print_table(rows: Sequence[Measurement]) -> None:
    """Print `text_table` and the verdict below; on a terminal in colour."""
    styles = {FASTRANK: "bold green", WRONG: "red", FAILED: "red", MISSING: "dim"}
    for number, line in enumerate(text_table(rows).splitlines()):
        first = re.split(r"  +|:", line.strip())[0]
        say(line, "bold" if number == 0 else styles.get(first, ""))
    sentence = verdict(rows)
    if sentence is not None:
        say(f"  {sentence}", "bold")


def variant_line(row: Measurement) -> str:
    """What is known of a variant before it is timed."""
    head = f"  {row.workload}: {row.variant}: "
    if row.status != OK:
        return f"{head}{row.status}: {row.reason}"
    known = [f"right, error {row.error:.0e}"]
    if row.peak_mib is not None:
        known.append(f"peak {_number(row.peak_mib)} MiB")
    return head + ", ".join(known)


def verdict(rows: Sequence[Measurement]) -> str | None:
    """One sentence on one workload: is fastrank faster than what plain PyTorch does, and does it
    take less memory; None where one of the two was not timed, or fastrank's own is wrong."""
    found = {row.variant: row for row in rows if row.timed}
    own = found.get(FASTRANK)
    plain = next((found[name] for name in PLAIN if name in found), None)
    if own is None or plain is None or not own_is_right(rows):
        return None
    text = f"{FASTRANK} takes {_time(own)}, {plain.variant} {_time(plain)}: "
    text += f"{_times(own.median_ms, plain.median_ms, 'faster', 'slower')}"
    if own.peak_mib and plain.peak_mib:
        text += f"; memory {_number(own.peak_mib)} against {_number(plain.peak_mib)} MiB: "
        text += f"{_times(own.peak_mib, plain.peak_mib, 'less', 'more')}"
    others = [row for row in found.values() if not row.ours and row is not plain]
    if others:
        best = min(others, key=lambda row: row.median_ms or 0.0)
        text += f"; of the others {best.variant} is the fastest with {_time(best)}"
    return f"{text}."


def _time(row: Measurement) -> str:
    milliseconds = row.median_ms or 0.0
    return f"{milliseconds / 1e3:.2f} s" if milliseconds >= 1e3 else f"{_number(milliseconds)} ms"


def _times(own: float | None, other: float | None, good: str, bad: str) -> str:
    """A ratio in words; a twentieth is within the noise of a busy machine."""
    assert own and other
    if max(own, other) < 1.05 * min(own, other):
        return "about the same"
    return f"{other / own:.2f} times {good}" if own < other else f"{own / other:.2f} times {bad}"


def markdown_table(header: Sequence[str], lines: Iterable[Sequence[str]], texts: int = 1) -> str:
    """A Markdown table: the first ``texts`` columns are text, the others numbers."""
    rule = ["---"] * texts + ["---:"] * (len(header) - texts)
    return "".join(f"| {' | '.join(line)} |\n" for line in (header, rule, *lines))


def _number(value: float | None) -> str:
    return _formatted(value, ".3g" if value is None or value < 100 else ",.0f")


def _formatted(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
