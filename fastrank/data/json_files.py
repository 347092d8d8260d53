"""JSON lines, of which a process can read a share, and JSON documents, which are read whole; both
may be compressed or in another encoding than UTF-8."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastrank.data.rows import Place, Row, parse_json
from fastrank.errors import InputError, one_line

#: A longer line is no record; held whole, it could take all of the memory.
LONGEST_LINE = 256 << 20
#: The same for a compressed JSON document.
LONGEST_DOCUMENT = 1 << 30

#: A JSON document may keep its rows under one of these names.
_CONTAINERS = ("data", "rows", "records", "train", "examples")

_BLOCK = 1 << 20

COMPRESSED = {".gz", ".bz2", ".xz", ".zst", ".zip"}
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
#: Encodings that a file may begin with the mark of; the longer marks first.
_ENCODINGS = (
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)


@dataclass(frozen=True)
class Lines:
    """One of ``parts`` equal shares of a file of JSON lines: the lines that begin in it.

    A compressed file is one share.
    """

    path: Path
    name: str
    part: int = 0
    parts: int = 1

    @property
    def num_bytes(self) -> int:
        """About the size of the share."""
        return self.path.stat().st_size // self.parts

    def __iter__(self) -> Iterator[tuple[Place, bytes]]:
        size = self.path.stat().st_size
        at, end = (size * k // self.parts for k in (self.part, self.part + 1))
        whole = is_recoded(self.path)
        with opened(self.path, self.name) as file:
            number = 1
            if at:
                number, at = _skip_to_line(file, at)
            while at < end or whole:
                line = file.readline(LONGEST_LINE)
                if not line:
                    return
                if len(line) >= LONGEST_LINE:
                    longest = f"{LONGEST_LINE >> 20} MiB"
                    raise InputError(
                        f"{self.name}, line {number}: longer than {longest}, not a record"
                    )
                at += len(line)
                if number == 1:
                    line = line.removeprefix(BYTE_ORDER_MARK)
                if line.strip():
                    yield Place(self.name, number), line.rstrip(b"\r\n")
                number += 1


def _skip_to_line(file: Any, at: int) -> tuple[int, int]:
    """Number and first byte of the first line that begins at byte ``at`` or later."""
    number = 1
    for start in range(0, at - 1, _BLOCK):
        number += file.read(min(_BLOCK, at - 1 - start)).count(b"\n")
    at -= 1
    while rest := file.readline(_BLOCK):
        at += len(rest)
        if rest.endswith(b"\n"):
            return number + 1, at
    return number, at


def is_json_lines(path: Path, name: str) -> bool:
    """Whether the first line is a whole JSON value and something follows it."""
    with opened(path, name) as file:
        lines = (line for line in file if line.strip())
        first = next(lines, b"")
        rest = next(lines, None) is not None
    try:
        value = json.loads(first.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return False
    holds_rows = isinstance(value, dict) and _container(value) is not None
    return rest or not holds_rows


def read_document(path: Path, name: str) -> list[Any]:
    """The rows of a JSON document, which is held whole: Python's parser has no other way."""
    with opened(path, name) as file:
        text = file.read(LONGEST_DOCUMENT + 1 if is_compressed(path) else -1)
    if is_compressed(path) and len(text) > LONGEST_DOCUMENT:
        raise InputError(f"{name}: unpacks to more than {LONGEST_DOCUMENT >> 20} MiB")
    value = parse_json(text, name)
    if isinstance(value, dict):
        held = _container(value)
        value = [value] if held is None else held
    if not isinstance(value, list):
        raise InputError(f"{name}: expected a JSON list of records, got {type(value).__name__}")
    return value


def _container(value: Row) -> list[Any] | None:
    for key in _CONTAINERS:
        held = value.get(key)
        if isinstance(held, list) and held and all(isinstance(item, dict) for item in held):
            return held
    return None


# ---- bytes -------------------------------------------------------------------------------------


@contextmanager
def opened(path: Path, name: str) -> Iterator[Any]:
    """A file's bytes, decompressed if its suffix says so, in UTF-8 if its first bytes name another
    encoding."""
    try:
        encoding = text_encoding(path, name)
        if encoding is not None:
            with path.open("rb") as file:
                yield _AsUtf8(file, encoding)
        elif is_compressed(path):
            import fsspec

            if path.suffix.lower() == ".zst" and "zstd" not in fsspec.available_compressions():
                raise InputError(f"{name}: needs another package: pip install zstandard")

            with fsspec.open(str(path), "rb", compression="infer") as file:
                yield file
        else:
            with path.open("rb") as file:
                yield file
    except InputError:
        raise
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name}: not {error.encoding} text, as its first bytes say it is ({error.reason})"
        ) from error
    except Exception as error:  # each decompressor raises its own
        reason = error.strerror if isinstance(error, OSError) else None
        raise InputError(f"{name}: cannot be read: {reason or one_line(error)}") from error


class _AsUtf8:
    """A file of another encoding, whose bytes are UTF-8.

    Lines end at a line feed alone; `codecs.EncodedFile` ends them at U+2028 too.
    """

    def __init__(self, file: Any, encoding: str) -> None:
        self._text = io.TextIOWrapper(file, encoding=encoding, newline="\n")

    def read(self, size: int = -1) -> bytes:
        return self._text.read(size).encode()

    def readline(self, size: int = -1) -> bytes:
        return self._text.readline(size).encode()

    def __iter__(self) -> Iterator[bytes]:
        return (line.encode() for line in self._text)


def text_encoding(path: Path, name: str) -> str | None:
    """The encoding whose mark a file begins with; None for UTF-8 and for compressed files."""
    if is_compressed(path):
        return None
    try:
        with path.open("rb") as file:
            head = file.read(4)
    except OSError as error:
        raise InputError(f"{name}: cannot be read: {error.strerror}") from error
    return next((encoding for mark, encoding in _ENCODINGS if head.startswith(mark)), None)


def is_recoded(path: Path) -> bool:
    """Whether a file's bytes are not those that are read, so that it has to be read from its
    beginning."""
    return is_compressed(path) or text_encoding(path, path.name) is not None


def is_compressed(path: Path) -> bool:
    return path.suffix.lower() in COMPRESSED
