"""Records tokenised once, in parallel, into a memory-mapped file; later starts only open it.

A cache entry is a folder: the groups (``groups.arrow``, see `fastrank.data.table`) and
``about.json``, which holds the report of what became of every record and what the entry was made
from. Its name is a hash of the latter: the source's content, the tokenizer, every option and the
versions of what tokenises. An entry is built in a folder of another name and renamed when it is
whole and on the disk, under a lock, so that the processes of one run build it once. What a killed
build leaves is removed by the next one.

A chat template that prints the date keeps that of the day on which its entry was built.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastrank.data.files import Source, one_line
from fastrank.data.identity import source_identity, tokenizer_identity
from fastrank.data.records import Reading
from fastrank.data.report import Report
from fastrank.data.stream import Tokenized, tokenize_source
from fastrank.data.tokenize import TokenizeOptions
from fastrank.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fastrank.data.table import GroupTable

#: To be raised when what is stored, or how records are tokenised, changes.
LAYOUT = 1

GROUPS_FILE = "groups.arrow"
ABOUT_FILE = "about.json"
_UNFINISHED = ".incomplete"


def default_cache_dir() -> Path:
    """``$HF_HOME/fastrank`` where that is set, else ``$XDG_CACHE_HOME/fastrank``, else
    ``~/.cache/fastrank``."""
    for variable in ("HF_HOME", "XDG_CACHE_HOME"):
        if os.environ.get(variable):
            return Path(os.environ[variable]).expanduser() / "fastrank"
    return Path.home() / ".cache" / "fastrank"


def cached_groups(
    source: Source,
    reading: Reading,
    tokenizer: PreTrainedTokenizerBase,
    options: TokenizeOptions,
    *,
    cache_dir: str | Path | None = None,
    num_proc: int = 1,
) -> tuple[GroupTable, Report]:
    """The groups of a source, tokenised by ``num_proc`` processes unless they are in the cache.

    Args:
        cache_dir: where the entries are; by default `default_cache_dir`.

    Raises:
        InputError: the source cannot be used, leaves nothing or changes while it is read; the cache
            cannot be written. Nothing is left in the cache then.
    """
    root = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
    made_from = {
        "layout": LAYOUT,
        "versions": {name: version(name) for name in ("fastrank", "transformers", "tokenizers")},
        "source": source_identity(source),
        "tokenizer": tokenizer_identity(tokenizer),
        "reading": asdict(reading),
        "options": asdict(options),
    }
    text = json.dumps(made_from, sort_keys=True)
    entry = root / f"groups-{hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}"
    found = _open(entry, source.name)
    if found is not None:
        return found
    with _writing(root):
        root.mkdir(parents=True, exist_ok=True)
        lock = _lock(entry)
    with lock:
        found = _open(entry, source.name)  # another process may have built it meanwhile
        if found is None:
            _remove_unfinished(root)
            _build(entry, made_from, source, reading, tokenizer, options, num_proc)
            found = _open(entry, source.name)
    if found is None:
        raise InputError(f"{entry}: the cache cannot be read back; try another --cache_dir")
    return found


def _open(entry: Path, name: str) -> tuple[GroupTable, Report] | None:
    """A whole entry, or None: one that was damaged later counts as absent."""
    import pyarrow as pa

    from fastrank.data.table import GroupTable

    try:
        about = json.loads((entry / ABOUT_FILE).read_text(encoding="utf-8"))
        table = GroupTable.open(entry / GROUPS_FILE, name)
    except (OSError, ValueError, pa.ArrowException):
        return None
    if len(table) != about["num_groups"]:
        return None
    report = Report.from_state(about["report"])
    report.name = name
    return table, report


def _build(
    entry: Path,
    made_from: dict[str, Any],
    source: Source,
    reading: Reading,
    tokenizer: PreTrainedTokenizerBase,
    options: TokenizeOptions,
    num_proc: int,
) -> None:
    import pyarrow as pa

    from fastrank.data.table import SCHEMA, record_batch

    unfinished = entry.with_name(entry.name + _UNFINISHED)
    report = Report(name=source.name)
    num_groups = 0
    try:
        with _writing(entry.parent):
            shutil.rmtree(unfinished, ignore_errors=True)  # of a build that was killed
            unfinished.mkdir()
            sink = pa.OSFile(str(unfinished / GROUPS_FILE), "wb")
            writer = pa.ipc.new_stream(sink, SCHEMA)
        with sink, _progress(source) as progress, ExitStack() as stack:
            tokenized = tokenize_source(
                source, reading, tokenizer, options, report, num_proc=num_proc, progress=progress
            )
            for groups in stack.enter_context(closing(tokenized)):
                num_groups += len(groups)
                with _writing(entry.parent):
                    writer.write_batch(record_batch(groups))
            with _writing(entry.parent):
                writer.close()
        if source_identity(source) != made_from["source"]:
            raise InputError(f"{source.name}: the file changed while it was read; start again")
        about = {"num_groups": num_groups, "made_from": made_from, "report": report.state()}
        with _writing(entry.parent):
            (unfinished / ABOUT_FILE).write_text(json.dumps(about), encoding="utf-8")
            for path in (unfinished / GROUPS_FILE, unfinished / ABOUT_FILE, unfinished):
                _flush(path)
            shutil.rmtree(entry, ignore_errors=True)  # a damaged one
            unfinished.rename(entry)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def _writing(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{root}: the cache cannot be written: {error.strerror or one_line(error)}; "
            "choose another folder with --cache_dir, or do without with --no_cache"
        ) from error


@contextmanager
def _progress(source: Source) -> Iterator[Any]:
    """A bar on a terminal, in bytes where the whole is known beforehand."""
    from tqdm import tqdm

    total = source.num_bytes if source.is_lines else None
    unit = {"unit": "B", "unit_scale": True} if source.is_lines else {"unit": " records"}
    with tqdm(desc="tokenising", total=total, disable=None, **unit) as bar:

        def advance(done: Tokenized) -> None:
            bar.update(done.num_bytes if source.is_lines else done.num_items)

        yield advance


def _lock(entry: Path) -> Any:
    from filelock import FileLock

    return FileLock(entry.with_name(entry.name + ".lock"))


def _remove_unfinished(root: Path) -> None:
    """Delete what builds that were killed have left; a build that goes on holds its lock."""
    from filelock import Timeout

    for folder in root.glob(f"groups-*{_UNFINISHED}"):
        lock = _lock(folder.with_name(folder.name.removesuffix(_UNFINISHED)))
        try:
            with lock.acquire(timeout=0):
                shutil.rmtree(folder, ignore_errors=True)
        except Timeout:
            continue


def _flush(path: Path) -> None:
    """Have a file or folder on the disk before anything relies on it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
