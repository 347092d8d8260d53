"""Rows out of files and data sets: JSON lines, JSON, Parquet, and all that `datasets` reads.

JSON lines have a reader of their own (`fastrank.data.json_files`), because every message about them
names the line. So have JSON documents: `datasets` turns NaN into null, and a broken score would
become a counted drop. Parquet is read in a limited process (`fastrank.data.parquet`): in this one,
a file of 33 KiB took 3.3 GiB. Everything else goes through `datasets`: CSV, TSV and Arrow files,
folders, saved data sets and Hub names.

The kind of a local file is told by its content (Parquet's magic, a leading bracket), not by its
suffix: much published ``.json`` is JSON lines. A name is only looked up on the Hub if nothing on
disk could have been meant: a mistyped path must not become a network request.

A `Source` hands rows out unparsed where it can, and in pieces, so that several processes can read
and parse them.
"""

from __future__ import annotations

import glob
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeVar

from fastrank.data.hub import use_hub
from fastrank.data.json_files import (
    BYTE_ORDER_MARK,
    COMPRESSED,
    Lines,
    is_compressed,
    is_json_lines,
    is_recoded,
    opened,
    read_document,
    text_encoding,
)
from fastrank.data.manifest import content_hash
from fastrank.data.parquet import UnreadableError, parquet_lines
from fastrank.data.rows import Piece, Place, Row, parse_row
from fastrank.errors import InputError, one_line
from fastrank.options.paths import local_path

_HUB_NAME = re.compile(r"^[\w][\w.-]*/[\w][\w.-]*(:[\w.-]+){0,2}$")
#: Fields that hold text in any format.
_TEXTS = (
    *("prompt", "question", "query", "instruction", "input", "history", "user_input", "system"),
    *("response", "completion", "chosen", "rejected", "text", "winner", "ended"),
    *("response_a", "response_b", "response_0", "response_1", "response_2", "response1"),
    *("response2", "response_j", "response_k", "completion_a", "completion_b", "answer_0"),
    *("answer_1", "human_ref_A", "human_ref_B", "message_id", "parent_id"),
)
#: A text that looks like a number or a missing value is a text.
_CSV = {
    "converters": dict.fromkeys(_TEXTS, str),
    "keep_default_na": False,
    "na_values": [""],
}
#: Files that `datasets` reads: the name of its loader and the loader's options.
_LOADERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", _CSV),
    ".tsv": ("csv", _CSV | {"sep": "\t"}),
    ".arrow": ("arrow", {}),
}
_FILE_SUFFIXES = {".json", ".jsonl", ".ndjson", ".parquet", ".txt", *_LOADERS, *COMPRESSED}

T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """A file or data set, looked up but not yet read.

    Attributes:
        name: as the user gave it, for messages.
        kind: JSON "lines", a JSON "document", "parquet", a "table" (a `datasets.Dataset`), or a
            "stream" of dictionaries, which is read once, by one process.
        path: the local file; None for a folder, a Hub name or an object.
        data: the data set or the iterable.
    """

    name: str
    kind: Literal["lines", "document", "parquet", "table", "stream"]
    path: Path | None = None
    data: Any = None

    def pieces(self, count: int = 1) -> Sequence[Piece]:
        """The rows in file order, as at most ``count`` consecutive pieces of about the same size.

        Rows are unparsed where the file allows it; `parse_row` parses them.
        """
        if self.kind == "stream":
            return [_numbered(self.name, self.data)]
        if self.kind == "table":
            spans = [range(a, b) for a, b in bounds(len(self.data), count)]
            return [TableRows(self.name, self.data, span) for span in spans]
        assert self.path is not None
        if self.kind == "document":
            return slices(list(_numbered(self.name, read_document(self.path, self.name))), count)
        if self.kind == "parquet":
            return [ParquetRows(self.path, self.name, part, count) for part in range(count)]
        count = 1 if is_recoded(self.path) else count
        return [Lines(self.path, self.name, part, count) for part in range(count)]

    @property
    def num_bytes(self) -> int:
        """Size of the file or of the data set's table; 0 where it is not known."""
        if self.path is not None:
            return self.path.stat().st_size
        return int(self.data.data.nbytes) if self.kind == "table" else 0

    def identity(self) -> dict[str, Any] | None:
        """What tells the content from any other, as JSON types; None for a stream.

        A file is known by its resolved path, size, time of change and `content_hash`. A copy or a
        touched file is therefore tokenised again, which costs time and never correctness. A data
        set is known by the fingerprint that `datasets` gives it.
        """
        if self.path is None:
            return None if self.kind == "stream" else {"dataset": self.data._fingerprint}
        status = self.path.stat()
        return {
            "path": str(self.path.resolve()),
            "size": status.st_size,
            "mtime_ns": status.st_mtime_ns,
            "content": content_hash(self.path),
        }


def read_rows(source: Any) -> Iterator[tuple[Place, Row]]:
    """Rows of a source, parsed, with their places; for arguments and errors see `open_source`."""
    for place, raw in chain.from_iterable(open_source(source).pieces()):
        yield place, parse_row(place, raw)


def open_source(source: Any) -> Source:
    """Look up where rows come from.

    Args:
        source: a file, a pattern of files (``shards/*.jsonl``), a folder (of files, or written by
            ``save_to_disk``) or a Hub name ``owner/name``; folders and names may carry ``:split``
            or ``:config:split`` (default split ``train``). Or a `datasets.Dataset`, or any iterable
            of dictionaries, a `datasets.IterableDataset` among them.

    Raises:
        InputError: it does not exist, is empty or cannot be read.
    """
    if not isinstance(source, (str, Path)):
        return _open_object(source)
    name = str(source)
    if not name.strip():
        raise InputError("the path of the data is empty")
    local = local_path(name)
    try:
        if local.is_file():
            return _open_file(local, name)
        if local.is_dir():
            return _open_folder(local, name, None, "train")
    except OSError as error:  # a name too long for the file system, a folder that may not be read
        raise InputError(f"{one_line(name)}: {error.strerror}") from error
    if glob.has_magic(name):
        return _open_pattern(name)
    base, config, split = _split_name(name)
    if local_path(base).is_dir():
        return _open_folder(local_path(base), name, config, split)
    if looks_like_path(base) or not _HUB_NAME.match(name):
        raise InputError(f"{one_line(name)}: no such file")
    use_hub()
    return Source(name, "table", data=_load(name, base, config, split=split))


def looks_like_path(name: str) -> bool:
    """Whether a name not on disk was surely meant to be: it is then never asked of the Hub."""
    if name.startswith((".", "/", "~", "\\")) or "\\" in name or name.endswith("/"):
        return True
    if name.count("/") > 1 or Path(name).suffix.lower() in _FILE_SUFFIXES:
        return True
    return "/" in name and Path(name.split("/")[0]).exists()


def _open_object(source: Any) -> Source:
    datasets = sys.modules.get("datasets")  # whoever has a data set has imported it
    if datasets is not None and isinstance(source, datasets.Dataset):
        return Source("data set", "table", data=source)
    if isinstance(source, dict):
        splits = one_line(", ".join(map(str, source)) or "none", 80)
        raise InputError(
            f"expected rows or one split of a data set, got a dictionary of {splits}: choose one, "
            "or join them (datasets.concatenate_datasets)"
        )
    if not isinstance(source, Iterable):
        raise InputError(f"expected a path or rows, got {type(source).__name__}")
    return Source("data set", "stream", data=source)


def _open_file(path: Path, name: str) -> Source:
    """A local file; ``datasets`` makes an Arrow file of what it reads, in its own cache."""
    inner = path.with_suffix("") if is_compressed(path) else path
    loader = _LOADERS.get(inner.suffix.lower())
    if loader is not None:
        encoding = text_encoding(path, name)
        more = {} if loader[0] != "csv" or encoding is None else {"encoding": encoding}
        data = _load(name, loader[0], data_files=str(path), split="train", **loader[1], **more)
        return Source(name, "table", path, data)
    with opened(path, name) as file:
        head = file.read(4096)
    if head.startswith(b"PAR1") or path.suffix.lower() == ".parquet":
        return Source(name, "parquet", path)
    start = head.removeprefix(BYTE_ORDER_MARK).lstrip()
    if not start and len(head) < 4096:
        raise InputError(f"{name}: the file is empty")
    is_document = inner.suffix.lower() == ".json" and not is_json_lines(path, name)
    if start.startswith(b"[") or is_document:
        return Source(name, "document", path)
    return Source(name, "lines", path)


def matching_files(pattern: str) -> list[str]:
    """The files that a pattern matches, sorted; none for a text that is no pattern."""
    if not glob.has_magic(pattern):
        return []
    found = glob.glob(str(local_path(pattern)), recursive=True)
    return sorted(file for file in found if Path(file).is_file())


def _open_pattern(name: str) -> Source:
    """All files that a pattern matches, in the order of their names, as one data set."""
    files = matching_files(name)
    if not files:
        raise InputError(f"{one_line(name)}: no file matches")
    if len(files) == 1:
        return _open_file(Path(files[0]), files[0])
    inner = {
        Path(file).with_suffix("").suffix if is_compressed(Path(file)) else Path(file).suffix
        for file in files
    }
    kinds = {_LOADERS.get(suffix.lower(), ("json", {}))[0] for suffix in inner - {".parquet"}}
    kinds |= {"parquet"} if ".parquet" in inner else set()
    if len(kinds) > 1:
        raise InputError(f"{name}: matches files of several kinds: {', '.join(sorted(inner))}")
    options = _LOADERS[inner.pop().lower()][1] if kinds == {"csv"} else {}
    return Source(
        name, "table", data=_load(name, kinds.pop(), data_files=files, split="train", **options)
    )


def _open_folder(folder: Path, name: str, config: str | None, split: str) -> Source:
    if any((folder / file).is_file() for file in ("state.json", "dataset_dict.json")):
        import datasets

        if config is not None:
            raise InputError(
                f"{name}: a data set saved by save_to_disk has no configuration '{config}'; give "
                "FOLDER:SPLIT"
            )
        with _loading(name):
            data = datasets.load_from_disk(str(folder))
        if isinstance(data, datasets.DatasetDict):
            if split not in data:
                raise InputError(f"{name}: no split '{split}'; it has {', '.join(data)}")
            data = data[split]
        return Source(name, "table", data=data)
    return Source(name, "table", data=_load(name, str(folder), config, split=split))


def _split_name(name: str) -> tuple[str, str | None, str]:
    base, *rest = name.split(":")
    if len(rest) == 1:
        return base, None, rest[0]
    if len(rest) == 2:
        return base, rest[0], rest[1]
    return name, None, "train"


def _load(name: str, *args: Any, **options: Any) -> Any:
    import datasets

    with _loading(name):
        return datasets.load_dataset(*args, **options)


@contextmanager
def _loading(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # `datasets` raises dozens of unrelated types, network ones included
        cause = error.__cause__ or error  # "An error occurred while generating the dataset"
        reason = f"{type(cause).__name__}: {one_line(cause)}"
        raise InputError(f"{name}: cannot be loaded as a data set: {reason}") from error


# ---- pieces ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ParquetRows:
    """The rows of one of ``parts`` equal shares of a Parquet file's row groups, as JSON objects."""

    path: Path
    name: str
    part: int = 0
    parts: int = 1

    def __iter__(self) -> Iterator[tuple[Place, bytes]]:
        try:
            for number, line in parquet_lines(self.path, self.part, self.parts):
                yield Place(self.name, number, "record"), line
        except UnreadableError as error:
            reason = one_line(error)
            raise InputError(f"{self.name}: not a readable Parquet file: {reason}") from error


@dataclass(frozen=True)
class TableRows:
    """Consecutive rows of a `datasets.Dataset`."""

    name: str
    data: Any
    span: range

    def __iter__(self) -> Iterator[tuple[Place, Row]]:
        whole = len(self.span) == len(self.data)
        rows = self.data if whole else self.data.select(self.span)
        return _numbered(self.name, rows, self.span.start + 1)


def _numbered(name: str, rows: Iterable[Any], start: int = 1) -> Iterator[tuple[Place, Any]]:
    for number, row in enumerate(rows, start):
        yield Place(name, number, "record"), row


def slices(items: Sequence[T], count: int) -> list[Sequence[T]]:
    """The items as at most ``count`` consecutive parts of about the same length."""
    return [items[a:b] for a, b in bounds(len(items), count)]


def bounds(length: int, count: int) -> list[tuple[int, int]]:
    """Begin and end of at most ``count`` consecutive parts, at least one, of a sequence.

    >>> bounds(5, 2)
    [(0, 2), (2, 5)]
    """
    count = max(1, min(count, length))
    return [(length * k // count, length * (k + 1) // count) for k in range(count)]
