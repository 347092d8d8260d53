"""Rows out of files: JSON lines, JSON, Parquet, a folder or a Hub data set's name.

The kind of a local file is told by its content (Parquet's magic, a leading bracket), not by its
suffix: much published ``.json`` is JSON lines. JSON lines and Parquet are streamed; a JSON document
is held whole, because the standard library's parser has no other way. A name is only looked up on
the Hub if nothing on disk could have been meant: a mistyped path must not become a network request.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fastrank.errors import InputError

Row = dict[str, Any]

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


def read_rows(path: str | Path) -> Iterator[tuple[Place, Row]]:
    """Rows of a file, a folder (`datasets.load_dataset`) or a Hub data set, with their places.

    ``path`` is a file, a folder or ``owner/name``; the last two may carry ``:split`` or
    ``:config:split`` (default split ``train``).

    Raises:
        InputError: the path does not exist, is empty or unreadable, or a row is malformed; the text
            names the line.
    """
    name = str(path)
    local = Path(name).expanduser()
    try:
        if local.is_file():
            return _file_rows(local, name)
        if local.is_dir():
            return _dataset_rows(str(local), name, None, "train")
    except OSError as error:  # a name too long for the file system, a folder that may not be read
        raise InputError(f"{one_line(name)}: {error.strerror}") from error
    base, config, split = _split_name(name)
    if Path(base).expanduser().is_dir():
        return _dataset_rows(base, name, config, split)
    if looks_like_path(base) or not _HUB_NAME.match(name):
        raise InputError(f"{one_line(name)}: no such file")
    return _dataset_rows(base, name, config, split)


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


def _file_rows(path: Path, name: str) -> Iterator[tuple[Place, Row]]:
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError as error:
        raise InputError(f"{name}: cannot be read: {error.strerror}") from error
    if head.startswith(b"PAR1") or path.suffix.lower() == ".parquet":
        return _parquet_rows(path, name)
    start = head.removeprefix(_BYTE_ORDER_MARK).lstrip()
    if not start and len(head) < 4096:
        raise InputError(f"{name}: the file is empty")
    if start.startswith(b"[") or (path.suffix.lower() == ".json" and not _is_json_lines(path)):
        return _json_rows(path, name)
    return _jsonl_rows(path, name)


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


def _jsonl_rows(path: Path, name: str) -> Iterator[tuple[Place, Row]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(_BYTE_ORDER_MARK)
            if not line.strip():
                continue
            place = Place(name, number)
            yield place, _row(_parse(line.rstrip(b"\r\n"), str(place)), place)


def _json_rows(path: Path, name: str) -> Iterator[tuple[Place, Row]]:
    value = _parse(path.read_bytes(), name)
    if isinstance(value, dict):
        held = _container(value)
        value = [value] if held is None else held
    if not isinstance(value, list):
        raise InputError(f"{name}: expected a JSON list of records, got {type(value).__name__}")
    for number, item in enumerate(value, start=1):
        place = Place(name, number, "record")
        yield place, _row(item, place)


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


def _parquet_rows(path: Path, name: str) -> Iterator[tuple[Place, Row]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for item in batch.to_pylist():
                    number += 1
                    yield Place(name, number, "record"), item
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{name}: not a readable Parquet file: {one_line(error)}") from error


def _dataset_rows(
    base: str, name: str, config: str | None, split: str
) -> Iterator[tuple[Place, Row]]:
    import datasets

    try:
        data = datasets.load_dataset(base, config, split=split)
    except (
        Exception
    ) as error:  # this boundary raises dozens of unrelated types, network ones included
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise InputError(f"{name}: cannot be loaded as a data set: {reason}") from error
    for number, item in enumerate(data, start=1):
        yield Place(name, number, "record"), dict(item)
