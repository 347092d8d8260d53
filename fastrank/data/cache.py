"""Records tokenised once, in parallel, into a `datasets.Dataset`; later starts only open it.

A cache entry is a folder: the Arrow files of the groups (see `fastrank.data.cached_groups`) and
``about.json``, which holds the report of what became of every record and what the entry was made
from. Its name is a hash of the latter: the source's content, the tokenizer, every option and the
versions of what tokenises. An entry is built in a folder of another name and renamed when it is
whole and on the disk, under a lock, so that the processes of one run build it once. What a killed
build leaves is removed by the next one.

`datasets.Dataset.from_generator` runs the processes and writes the files. It has no way to bring
home a report, or the line of an error, so every process leaves both in the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fastrank.data.cached_groups import CachedGroups, as_row, features
from fastrank.data.files import Lines, Place, Source, one_line
from fastrank.data.records import Reading, RecordReader, Unread, open_records, require_records
from fastrank.data.report import Report
from fastrank.data.tokenize import TokenizeOptions, encode_rows
from fastrank.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

#: To be raised when what is stored, or how records are tokenised, changes.
LAYOUT = 3

ABOUT_FILE = "about.json"
_UNFINISHED = ".incomplete"

#: Rows between two looks at whether an earlier part of the file has failed.
_LOOK_EVERY = 128


def default_cache_dir() -> Path:
    """``$HF_HOME/fastrank`` where that is set, else ``$XDG_CACHE_HOME/fastrank``, else
    ``~/.cache/fastrank``."""
    for variable in ("HF_HOME", "XDG_CACHE_HOME"):
        if os.environ.get(variable):
            return Path(os.environ[variable]).expanduser() / "fastrank"
    return Path.home() / ".cache" / "fastrank"


def default_num_proc() -> int:
    """The processor cores that this process may use; 1 where processes cannot be forked.

    There a fast tokenizer still uses several threads.
    """
    if not sys.platform.startswith("linux"):
        return 1
    return len(os.sched_getaffinity(0))


def cached_groups(
    source: Source,
    reading: Reading,
    tokenizer: PreTrainedTokenizerBase,
    options: TokenizeOptions,
    *,
    cache_dir: str | Path | None = None,
    num_proc: int = 1,
) -> tuple[CachedGroups, Report]:
    """The groups of a source, tokenised by ``num_proc`` processes unless they are in the cache.

    Args:
        cache_dir: where the entries are; by default `default_cache_dir`.

    Raises:
        InputError: the source cannot be used, leaves nothing or changes while it is read; the cache
            cannot be written; a process was killed. Nothing is left in the cache then.
    """
    root = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
    identity = source.identity()
    if identity is None:
        raise InputError(f"{source.name}: rows of an iterable cannot be told again, so not cached")
    made_from = {
        "layout": LAYOUT,
        "versions": {name: version(name) for name in ("fastrank", "transformers", "tokenizers")},
        "source": identity,
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


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase, *, with_template: bool = True) -> str:
    """Hash of everything that a tokenizer's output depends on: its serialised content, the
    special tokens, and the chat template unless that is to be left out."""
    digest = hashlib.blake2b(digest_size=16)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        for transient in ("truncation", "padding"):  # set and unset by every call
            content.pop(transient, None)
        digest.update(json.dumps(content, sort_keys=True).encode())
    else:  # one in Python: whatever it saves
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            for path in sorted(Path(folder).rglob("*")):
                if path.is_file():
                    digest.update(path.name.encode() + path.read_bytes())
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    about = [
        type(tokenizer).__name__,
        tokenizer.chat_template if with_template else None,
        special,
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
    ]
    digest.update(json.dumps(about, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _open(entry: Path, name: str) -> tuple[CachedGroups, Report] | None:
    """A whole entry, or None: one that was damaged later counts as absent."""
    import pyarrow as pa

    try:
        about = json.loads((entry / ABOUT_FILE).read_text(encoding="utf-8"))
        groups = CachedGroups(entry, name)
    except (OSError, ValueError, pa.ArrowException):
        return None
    if len(groups) != about["num_groups"]:
        return None
    report = Report.from_state(about["report"])
    report.name = name
    return groups, report


def _build(
    entry: Path,
    made_from: dict[str, Any],
    source: Source,
    reading: Reading,
    tokenizer: PreTrainedTokenizerBase,
    options: TokenizeOptions,
    num_proc: int,
) -> None:
    report = Report(name=source.name)
    unfinished = entry.with_name(entry.name + _UNFINISHED)
    try:
        pieces, reader = open_records(source, reading, report, num_proc)
        with _writing(entry.parent):
            shutil.rmtree(unfinished, ignore_errors=True)  # of a build that was killed
            unfinished.mkdir()
            work = _Work(reader, tokenizer, options, unfinished)
            num_groups = _generate(work, pieces, _rows_per_write(source))
        for number in range(len(pieces)):
            part = json.loads((unfinished / f"{number}.json").read_text(encoding="utf-8"))
            if part["error"] is not None:
                raise InputError(part["error"])
            report.merge(Report.from_state(part["report"]))
            (unfinished / f"{number}.json").unlink()
        require_records(report)
        if source.identity() != made_from["source"]:
            raise InputError(f"{source.name}: the file changed while it was read; start again")
        about = {"num_groups": num_groups, "made_from": made_from, "report": report.state()}
        with _writing(entry.parent):
            (unfinished / ABOUT_FILE).write_text(json.dumps(about), encoding="utf-8")
            for path in (*unfinished.iterdir(), unfinished):
                _flush(path)
            shutil.rmtree(entry, ignore_errors=True)  # a damaged one
            unfinished.rename(entry)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _generate(
    work: _Work, pieces: Sequence[Iterable[tuple[Place, Unread]]], rows_per_write: int
) -> int:
    """Have each piece tokenised by a process into Arrow files in the folder; the number of groups.

    Raises:
        OSError: the files cannot be written.
        InputError: a process was killed.
    """
    from datasets import Dataset

    several = len(pieces) > 1
    try:
        with _silent(), _dependent_children() if several else nullcontext():
            dataset = Dataset.from_generator(
                work,
                features(),
                cache_dir=str(work.folder / "datasets"),
                gen_kwargs={"pieces": list(enumerate(pieces))},
                num_proc=len(pieces) if several else None,
                fingerprint="groups",
                writer_batch_size=rows_per_write,
            )
    except Exception as error:
        cause = _cause(error)
        if cause is None:  # no group at all
            return 0
        if cause is error:
            raise
        raise cause from None
    for number, file in enumerate(dataset.cache_files):
        os.replace(file["filename"], work.folder / f"groups-{number:05d}.arrow")
    shutil.rmtree(work.folder / "datasets")
    return len(dataset)


@dataclass(frozen=True)
class _Work:
    """The generator of the rows of some pieces, as `datasets` calls it; picklable.

    What became of piece k is left in ``k.json``: the report and the error that ended it, if any.
    An error does not end the other processes at once, so that the first in the file is reported,
    as one process would; those behind it stop soon.
    """

    reader: RecordReader
    tokenizer: PreTrainedTokenizerBase
    options: TokenizeOptions
    folder: Path

    def __call__(
        self, pieces: list[tuple[int, Iterable[tuple[Place, Unread]]]]
    ) -> Iterator[dict[str, Any]]:
        for number, piece in pieces:
            report, failed = Report(), None
            try:
                rows = self._until_failure(number, _with_progress(piece) if not number else piece)
                for record, encoded in encode_rows(
                    rows, self.reader, self.tokenizer, self.options, report
                ):
                    yield as_row(record, encoded)
            except InputError as error:
                failed = str(error)
                (self.folder / f"{number}.failed").touch()
            about = {"report": report.state(), "error": failed}
            (self.folder / f"{number}.json").write_text(json.dumps(about), encoding="utf-8")

    def _until_failure(self, number: int, rows: Iterable[T]) -> Iterator[T]:
        """The rows, up to where an earlier piece is known to have failed."""
        for count, row in enumerate(rows):
            if count % _LOOK_EVERY == 0 and any(
                int(file.stem) < number for file in self.folder.glob("*.failed")
            ):
                return
            yield row


def _with_progress(piece: Iterable[tuple[Place, Unread]]) -> Iterator[tuple[Place, Unread]]:
    """The rows, with a bar on a terminal: the first piece's stands for all, of about its size."""
    from tqdm import tqdm

    lines = isinstance(piece, Lines)
    total = piece.num_bytes if isinstance(piece, Lines) else None
    unit: dict[str, Any] = {"unit": "B", "unit_scale": True} if lines else {"unit": " records"}
    with tqdm(desc="tokenising", total=total, disable=None, **unit) as bar:
        for place, row in piece:
            yield place, row
            bar.update(len(row) + 1 if isinstance(row, bytes) and lines else 1)


def _rows_per_write(source: Source) -> int:
    """Rows that a process holds before it writes them: at most 256, and about 4 MiB of text."""
    num_bytes, rows = 0, 1
    if source.kind == "table":
        num_bytes, rows = source.num_bytes, len(source.data)
    elif source.kind == "lines" and source.path is not None:
        with source.path.open("rb") as file:
            head = file.read(1 << 20)
        num_bytes, rows = len(head), head.count(b"\n") + 1
    return max(1, min(256, (4 << 20) * rows // max(1, num_bytes)))


def _cause(error: Exception) -> BaseException | None:
    """What an exception of `Dataset.from_generator` stands for; None for a data set without rows.

    It wraps those of the generator and of the writer, in text where another process sent them, and
    replaces a `KeyboardInterrupt` by that of a result it could not wait for.
    """
    if "corresponds to no data" in str(error):
        return None
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None:
        chain.append(link)
        link = link.__cause__ or link.__context__
    for link in chain:
        if isinstance(link, (KeyboardInterrupt, OSError)):
            return link
        if "abruptly died" in str(link):
            return InputError(
                "a tokenising process was ended from outside, possibly out of memory; "
                "try fewer of them (num_proc)"
            )
        sent = re.findall(r"^OSError: (?:\[Errno \d+\] )?(.*)", str(link), re.MULTILINE)
        if sent:
            return OSError(0, sent[0])
    return error


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
def _silent() -> Iterator[None]:
    """`datasets` shows no bars of its own, which would be there without a terminal too."""
    from datasets.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


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


# ---- processes -------------------------------------------------------------------------------

#: Builds under way in this process.
_builds: list[object] = []


@contextmanager
def _dependent_children() -> Iterator[None]:
    """Processes forked meanwhile leave Ctrl-C to this one, end with it, and tokenise in one thread.

    The variable has to be set before they are forked: a tokenizer that was used with several
    threads warns otherwise.
    """
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    _builds.append(None)
    try:
        yield
    finally:
        _builds.pop()
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _after_fork() -> None:
    if _builds:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    """A worker, and the process that carries its messages, wait for ever when the parent is killed.

    The signal that Linux can send instead comes when the parent's *thread* ends, and that of a pool
    that replaces dead workers ends before them.
    """
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
