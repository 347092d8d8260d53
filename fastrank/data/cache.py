"""Records tokenised once, in parallel, into Arrow files; later starts only open them.

A cache entry is a folder: the Arrow files of the groups (see `fastrank.data.cached_groups`),
``report.json``, which tells what became of every record, and ``about.json``, which holds checksums
of both and of itself, and what the entry was made from. Its name is a hash of the latter: the
source's content, the tokenizer, every option and the versions of what tokenises. An entry is built
in a folder of another name and renamed when it is whole and on the disk, under a lock, so that the
processes of one run build it once. What a killed build leaves is removed by the next one, and an
entry that was damaged is built anew.

The files are `datasets`' own, but written here, one by each process. `Dataset.from_generator` with
several processes takes one more to carry their messages, a copy of this one's memory (the first
start of ``bench/data_scale.py`` with 40,000 records: 1,506 MiB instead of 1,163), checks every row
in Python, and has no way to bring home a report or the line of an error.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import fastrank
from fastrank.console import Bar
from fastrank.data.cached_groups import CachedGroups, group_files, group_writer
from fastrank.data.files import Source
from fastrank.data.json_files import Lines
from fastrank.data.manifest import (
    damaged_file,
    flush,
    read_sealed,
    write_sealed,
    written_files,
)
from fastrank.data.records import (
    Reading,
    Record,
    RecordReader,
    Unread,
    open_records,
    require_records,
)
from fastrank.data.report import Report
from fastrank.data.rows import Place
from fastrank.data.tokenize import Encoded, TokenizeOptions, encode_rows
from fastrank.data.turns import SEVERAL
from fastrank.errors import InputError, one_line
from fastrank.options.paths import local_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: To be raised when what is stored, or how records are tokenised, changes.
LAYOUT = 6

ABOUT_FILE, REPORT_FILE = "about.json", "report.json"
_UNFINISHED = ".incomplete"

#: A batch of an Arrow file ends after so many groups, or so many tokens.
BATCH_ROWS = 256
BATCH_TOKENS = 1 << 20

#: Rows between two looks at whether an earlier part of the file has failed.
_LOOK_EVERY = 128


def default_cache_dir() -> Path:
    """``$HF_HOME/fastrank`` where that is set, else ``$XDG_CACHE_HOME/fastrank``, else
    ``~/.cache/fastrank``."""
    for variable in ("HF_HOME", "XDG_CACHE_HOME"):
        if os.environ.get(variable):
            return local_path(os.environ[variable]) / "fastrank"
    return Path.home() / ".cache" / "fastrank"


def default_num_proc() -> int:
    """The processor cores that this process may use; 1 where processes cannot be forked.

    There a fast tokenizer still uses several threads.
    """
    if not sys.platform.startswith("linux"):
        return 1
    return len(os.sched_getaffinity(0))


def _versions() -> dict[str, str]:
    found = {name: version(name) for name in ("transformers", "tokenizers")}
    return {"fastrank": fastrank.__version__, **found}  # a checkout need not be installed


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
    root = default_cache_dir() if cache_dir is None else local_path(cache_dir)
    identity = source.identity()
    if identity is None:
        raise InputError(f"{source.name}: rows of an iterable cannot be told again, so not cached")
    made_from = {
        "layout": LAYOUT,
        "versions": _versions(),
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
            if entry.exists():
                logger.warning("%s is damaged (%s): built anew", entry, _damage(entry))
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
    """A whole entry, all of whose bytes have been read; None if there is none, or it is damaged."""
    if _damage(entry) is not None:
        return None
    report = Report.from_state(json.loads((entry / REPORT_FILE).read_text(encoding="utf-8")))
    report.name = name
    return CachedGroups(entry, name, masked=SEVERAL in report.notes), report


def _damage(entry: Path) -> str | None:
    """What distinguishes an entry from what was written, in a few words; None if nothing does."""
    about = read_sealed(entry / ABOUT_FILE)
    if about is None:
        return f"{ABOUT_FILE} is missing or not as it was written"
    for file in group_files(entry):
        if file.name not in about["files"]:
            return f"{file.name} is none of its files"
    return damaged_file(entry, about["files"])


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
            pieces_done = _tokenise(work, pieces)
        for done in pieces_done:
            if done.error is not None:
                raise InputError(done.error)
            report.merge(done.report)
        require_records(report)
        if source.identity() != made_from["source"]:
            raise InputError(f"{source.name}: the file changed while it was read; start again")
        num_groups = sum(done.num_groups for done in pieces_done)
        about = {"num_groups": num_groups, "made_from": made_from}
        with _writing(entry.parent):
            saved = unfinished / REPORT_FILE
            saved.write_text(json.dumps(report.state()), encoding="utf-8")
            files = written_files(unfinished, [saved, *group_files(unfinished)])
            write_sealed(unfinished / ABOUT_FILE, about | {"files": files})
            flush(unfinished)
            shutil.rmtree(entry, ignore_errors=True)  # a damaged one
            unfinished.rename(entry)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _tokenise(work: _Work, pieces: Sequence[Iterable[tuple[Place, Unread]]]) -> list[_Done]:
    """What became of each piece, each tokenised by a process of its own if there are several.

    Processes are forked where that is the system's way (Linux), so that a script needs no
    ``__main__`` guard and nothing is sent to them; they use neither torch nor a device.

    Raises:
        OSError: the files cannot be written.
        InputError: a process was killed.
    """
    if len(pieces) < 2:
        return [work(number, piece) for number, piece in enumerate(pieces)]
    context = multiprocessing.get_context("fork" if sys.platform.startswith("linux") else None)
    with ProcessPoolExecutor(len(pieces), context, _start, (work, pieces)) as pool:
        try:
            with _single_threaded_tokenizers():
                running = [pool.submit(_run, number) for number in range(len(pieces))]
            return [one.result() for one in running]
        except BrokenProcessPool as error:
            raise InputError(
                "a tokenising process was ended from outside, possibly out of memory; "
                "try fewer of them (num_proc)"
            ) from error
        except BaseException:
            work.fail(-1)  # before every piece: all of them stop
            raise


class _Done(NamedTuple):
    """What became of a piece: its usable groups, and the error that ended it, if any."""

    num_groups: int
    report: Report
    error: str | None


@dataclass(frozen=True)
class _Work:
    """Tokenises pieces of a source into files of a folder.

    An error does not end the other processes at once, so that the first in the file is reported,
    as one process would; those behind it stop soon.
    """

    reader: RecordReader
    tokenizer: PreTrainedTokenizerBase
    options: TokenizeOptions
    folder: Path

    def __call__(self, number: int, piece: Iterable[tuple[Place, Unread]]) -> _Done:
        """Tokenise piece ``number``; an `InputError` is returned."""
        report, error, num_groups = Report(), None, 0
        rows = self._until_failure(number, piece if number else _with_progress(piece))
        groups = encode_rows(rows, self.reader, self.tokenizer, self.options, report)
        with group_writer(self.folder / f"groups-{number:05d}.arrow") as write:
            try:
                for batch in _batches(groups):
                    write(batch)
                    num_groups += len(batch)
            except InputError as failure:
                error = str(failure)
                self.fail(number)
        return _Done(num_groups, report, error)

    def fail(self, number: int) -> None:
        """Have the pieces behind this one stop."""
        with suppress(OSError):
            (self.folder / f"{number}.failed").touch()

    def _until_failure(self, number: int, rows: Iterable[T]) -> Iterator[T]:
        """The rows, up to where an earlier piece is known to have failed."""
        for count, row in enumerate(rows):
            if count % _LOOK_EVERY == 0 and any(
                int(file.stem) < number for file in self.folder.glob("*.failed")
            ):
                return
            yield row


def _batches(groups: Iterable[tuple[Record, Encoded]]) -> Iterator[list[tuple[Record, Encoded]]]:
    """Groups in lists that are worth a batch of the file and small in memory."""
    batch: list[tuple[Record, Encoded]] = []
    num_tokens = 0
    for record, (prompt, responses) in groups:
        batch.append((record, (prompt, responses)))
        num_tokens += len(prompt) + sum(map(len, responses))
        if len(batch) >= BATCH_ROWS or num_tokens >= BATCH_TOKENS:
            yield batch
            batch, num_tokens = [], 0
    if batch:
        yield batch


def _with_progress(piece: Iterable[tuple[Place, Unread]]) -> Iterator[tuple[Place, Unread]]:
    """The rows, with a bar on a terminal: the first piece's stands for all, of about its size."""
    lines = isinstance(piece, Lines)
    total = piece.num_bytes if isinstance(piece, Lines) else None
    unit, scale = ("MB", 1e-6) if lines else ("records", 1.0)
    whole = None if total is None else total * scale
    with Bar(desc="tokenising", total=whole, unit=unit) as bar:
        for place, row in piece:
            yield place, row
            bar.update((len(row) + 1 if isinstance(row, bytes) and lines else 1) * scale)


@contextmanager
def _writing(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{root}: the cache cannot be written: {error.strerror or one_line(error)}; "
            "choose another folder with --cache_dir, or do without with --no_cache"
        ) from error


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


# ---- processes -------------------------------------------------------------------------------


@contextmanager
def _single_threaded_tokenizers() -> Iterator[None]:
    """Processes that start now tokenise in one thread: they are the parallelism.

    It has to be set before they are forked: a tokenizer that was used with several threads warns
    otherwise.
    """
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


#: In a process that tokenises: its work, and all pieces.
_given: list[Any] = []


def _start(work: _Work, pieces: Sequence[Iterable[tuple[Place, Unread]]]) -> None:
    """Prepare a process to tokenise: it leaves Ctrl-C to its parent and ends with it."""
    _given[:] = work, pieces
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End when the parent was killed: its pool would be waited for for ever.

    The signal that Linux can send instead comes when the parent's *thread* ends.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run(number: int) -> _Done:
    work, pieces = _given
    done: _Done = work(number, pieces[number])
    return done
