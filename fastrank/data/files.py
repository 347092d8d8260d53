"""Rows out of files: JSON lines, JSON, Parquet, a folder or a Hub data set's name.

The kind of a local file is told by its content (Parquet's magic, a leading bracket), not by its
suffix: much published ``.json`` is JSON lines. JSON lines and Parquet are streamed; a JSON document
is held whole, because the standard library's parser has no other way. A name is only looked up on
the Hub if nothing on disk could have been meant: a mistyped path must not become a network request.

A `Source` hands rows out unparsed where it can, so that parsing can be done by other processes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fastrank.errors import InputError

Row = dict[str, Any]
#: A row as it comes: the bytes of a JSON object, or the object.
RawRow = bytes | Row

#: A longer line is no record; held whole, it could take all of the memory.
LONGEST_LINE = 256 << 20

_HUB_NAME = re.compile(r"^[\w][\w.-]*/[\w][\w.-]*(:[\w.-]+){0,2}$")
_FILE_SUFFIXES = {".json", ".jsonl", ".ndjson", ".parquet", ".csv", ".txt", ".gz", ".zip", ".arrow"}
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"

#: A JSON document may keep its rows under one of these names.
_CONTAINERS = ("data", "rows", "records", "train", "examples")


class Place(NamedTuple):
    """Where a row came from; its text is how every message about it begins."""

    name: str
    line: int
    unit: str = "line"

    def __str__(self) -> str:
        return f"{self.name}, {self.unit} {self.line}"


def one_line(error: object, limit: int = 200) -> str:
    """The first line of an error's or a value's text, shortened, without control characters."""
    text = " ".join(str(error).split())
    text = "".join(c if c.isprintable() else "�" for c in text)
    return text if len(text) <= limit else text[: limit - 1] + "…"


@dataclass(frozen=True)
class Source:
    """Where rows come from, looked up but not yet read.

    Attributes:
        name: as the user gave it, for messages.
        path: the local file, or None for a data set.
        dataset: what `datasets.load_dataset` gave for a folder or a Hub name.
    """

    name: str
    path: Path | None = None
    dataset: Any = None

    def raw_rows(self) -> Iterator[tuple[Place, RawRow]]:
        """The rows, unparsed where the file allows it; `parse_row` parses them."""
        if self.path is not None:
            return _file_rows(self.path, self.name)
        return _dataset_rows(self.dataset, self.name)

    @property
    def is_lines(self) -> bool:
        """Whether the rows are the lines of a file of JSON lines."""
        return self.path is not None and _kind(self.path, self.name) == "lines"

    @property
    def num_bytes(self) -> int:
        """Size of the file, or of the data set's table."""
        if self.path is not None:
            return self.path.stat().st_size
        return int(self.dataset.data.nbytes)


def read_rows(path: str | Path) -> Iterator[tuple[Place, Row]]:
    """Rows of a file, a folder (`datasets.load_dataset`) or a Hub data set, with their places.

    ``path`` is a file, a folder or ``owner/name``; the last two may carry ``:split`` or
    ``:config:split`` (default split ``train``).

    Raises:
        InputError: the path does not exist, is empty or unreadable, or a row is malformed; the text
            names the line.
    """
    return _parsed(open_source(path).raw_rows())


def _parsed(rows: Iterator[tuple[Place, RawRow]]) -> Iterator[tuple[Place, Row]]:
    for place, raw in rows:
        yield place, parse_row(place, raw)


def parse_row(place: Place, raw: RawRow) -> Row:
    """A row of `Source.raw_rows` as a dictionary; raises `InputError` for one that is none."""
    return _row(_parse(raw, str(place)) if isinstance(raw, bytes) else raw, place)


def open_source(path: str | Path) -> Source:
    """The source that a path or name stands for; see `read_rows`."""
    name = str(path)
    local = Path(name).expanduser()
    try:
        if local.is_file():
            return Source(name, path=local)
        if local.is_dir():
            return _open_dataset(str(local), name, None, "train")
    except OSError as error:  # a name too long for the file system, a folder that may not be read
        raise InputError(f"{one_line(name)}: {error.strerror}") from error
    base, config, split = _split_name(name)
    if Path(base).expanduser().is_dir():
        return _open_dataset(base, name, config, split)
    if looks_like_path(base) or not _HUB_NAME.match(name):
        raise InputError(f"{one_line(name)}: no such file")
    return _open_dataset(base, name, config, split)


def looks_like_path(name: str) -> bool:
    """Whether a name not on disk was surely meant to be: it is then never asked of the Hub."""
    if name.startswith((".", "/", "~", "\\")) or "\\" in name or name.endswith("/"):
        return True
    if name.count("/") > 1 or Path(name).suffix.lower() in _FILE_SUFFIXES:
        return True
    return "/" in name and Path(name.split("/")[0]).exists()


def _split_name(name: str) -> tuple[str, str | None, str]:
    base, *rest = name.split(":")
    if len(rest) == 1:
        return base, None, rest[0]
    if len(rest) == 2:
        return base, rest[0], rest[1]
    return name, None, "train"


def _file_rows(path: Path, name: str) -> Iterator[tuple[Place, RawRow]]:
    kind = _kind(path, name)
    if kind == "parquet":
        return _parquet_rows(path, name)
    return _json_rows(path, name) if kind == "document" else _jsonl_rows(path, name)


def _kind(path: Path, name: str) -> str:
    """What a file holds: "parquet", a JSON "document", or JSON "lines"."""
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError as error:
        raise InputError(f"{name}: cannot be read: {error.strerror}") from error
    if head.startswith(b"PAR1") or path.suffix.lower() == ".parquet":
        return "parquet"
    start = head.removeprefix(_BYTE_ORDER_MARK).lstrip()
    if not start and len(head) < 4096:
        raise InputError(f"{name}: the file is empty")
    if start.startswith(b"[") or (path.suffix.lower() == ".json" and not _is_json_lines(path)):
        return "document"
    return "lines"


def _is_json_lines(path: Path) -> bool:
    """Whether the first line is a whole JSON value and something follows it."""
    with path.open("rb") as file:
        first = next((line for line in file if line.strip()), b"")
        rest = any(line.strip() for line in file)
    try:
        value = json.loads(first.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return False
    holds_rows = isinstance(value, dict) and _container(value) is not None
    return rest or not holds_rows


def _parse(text: bytes, place: str) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(f"{place}: not UTF-8 text (byte {error.start + 1})") from error
    except json.JSONDecodeError as error:
        where = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}"
        raise InputError(f"{place}: malformed JSON: {error.msg} ({where})") from error
    except RecursionError as error:
        raise InputError(f"{place}: malformed JSON: nested too deeply") from error
    except ValueError as error:  # an integer of thousands of digits
        raise InputError(f"{place}: malformed JSON: {one_line(error)}") from error


def _jsonl_rows(path: Path, name: str) -> Iterator[tuple[Place, RawRow]]:
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE), b""), start=1):
            if len(line) >= LONGEST_LINE:
                longest = f"{LONGEST_LINE >> 20} MiB"
                raise InputError(f"{name}, line {number}: longer than {longest}, not a record")
            if number == 1:
                line = line.removeprefix(_BYTE_ORDER_MARK)
            if line.strip():
                yield Place(name, number), line.rstrip(b"\r\n")


def _json_rows(path: Path, name: str) -> Iterator[tuple[Place, RawRow]]:
    value = _parse(path.read_bytes(), name)
    if isinstance(value, dict):
        held = _container(value)
        value = [value] if held is None else held
    if not isinstance(value, list):
        raise InputError(f"{name}: expected a JSON list of records, got {type(value).__name__}")
    for number, item in enumerate(value, start=1):
        yield Place(name, number, "record"), item


def _container(value: Row) -> list[Any] | None:
    for key in _CONTAINERS:
        held = value.get(key)
        if isinstance(held, list) and held and all(isinstance(item, dict) for item in held):
            return held
    return None


def _row(value: Any, place: Place) -> Row:
    if not isinstance(value, dict):
        raise InputError(f"{place}: expected a JSON object, got {type(value).__name__}")
    return value


def _parquet_rows(path: Path, name: str) -> Iterator[tuple[Place, RawRow]]:
    from fastrank.data.parquet import parquet_lines

    for number, line in enumerate(parquet_lines(path, name), start=1):
        yield Place(name, number, "record"), line


def _open_dataset(base: str, name: str, config: str | None, split: str) -> Source:
    import datasets

    try:
        data = datasets.load_dataset(base, config, split=split)
    except (
        Exception
    ) as error:  # this boundary raises dozens of unrelated types, network ones included
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise InputError(f"{name}: cannot be loaded as a data set: {reason}") from error
    return Source(name, dataset=data)


def _dataset_rows(dataset: Any, name: str) -> Iterator[tuple[Place, RawRow]]:
    for number, item in enumerate(dataset, start=1):
        yield Place(name, number, "record"), dict(item)
