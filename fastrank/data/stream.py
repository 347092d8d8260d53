"""Records to tokenised groups, portion by portion, in this process or in several.

The reading process only cuts the file into lines; parsing, checking and tokenising happen in the
workers, a portion at a time, and the results come back in the file's order, so that the report and
the first error are those of a single process. Only a few portions exist at any moment.

``datasets.map`` would want the texts in an Arrow table first, a second copy on the disk made by one
process, and has no way to bring a report home. Workers are forked where that is the system's way
(Linux), so that a script needs no ``__main__`` guard; they use neither torch nor a device.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from fastrank.data.files import Place, Source
from fastrank.data.records import Item, Reading, Record, RecordReader, open_records, require_records
from fastrank.data.report import Report
from fastrank.data.tokenize import TokenizeOptions, encode_records, truncate
from fastrank.data.tokenized import TokenizedGroups
from fastrank.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: A portion ends after so many items, or so many bytes of them.
PORTION_ITEMS = 128
PORTION_BYTES = 1 << 20
#: Portions under way or waiting to be taken, for each worker.
_AHEAD = 4

Portion = Sequence[tuple[Place, Item]]


class Tokenized(NamedTuple):
    """What became of one portion."""

    groups: TokenizedGroups
    report: Report
    num_items: int
    num_bytes: int


@dataclass(frozen=True)
class PortionTokenizer:
    """Items of one file to tokenised groups; picklable."""

    reader: RecordReader
    tokenizer: PreTrainedTokenizerBase
    options: TokenizeOptions

    def __call__(self, portion: Portion) -> Tokenized:
        """Raises `InputError` for a malformed item."""
        report = Report()
        found = (self.reader.read(place, item, report) for place, item in portion)
        records: list[Record] = [record for record in found if record is not None]
        whole = encode_records(records, self.tokenizer, report, as_chat=self.options.as_chat)
        kept = [(r, e) for r, e in zip(records, whole, strict=True) if e is not None]
        encoded = [truncate(e, self.tokenizer, self.options, report, r.line) for r, e in kept]
        groups = TokenizedGroups.from_encoded(
            encoded, [r.scores for r, _ in kept], [r.line for r, _ in kept]
        )
        return Tokenized(groups, report, len(portion), _num_bytes(portion))


def tokenize_source(
    source: Source,
    reading: Reading,
    tokenizer: PreTrainedTokenizerBase,
    options: TokenizeOptions,
    report: Report,
    *,
    num_proc: int = 1,
    progress: Callable[[Tokenized], None] | None = None,
) -> Generator[TokenizedGroups, None, None]:
    """Yield the usable groups of a source in its order, a portion at a time.

    Args:
        report: what became of the records is added to it, in step with what is yielded.
        num_proc: worker processes; 1 does everything in this one.
        progress: called with every portion.

    Raises:
        InputError: the source cannot be used or leaves nothing, a worker was killed.
    """
    items, reader = open_records(source, reading, report)
    work = PortionTokenizer(reader, tokenizer, options)
    for done in _map_in_order(work, portions(items), num_proc):
        report.merge(done.report)
        if progress is not None:
            progress(done)
        if len(done.groups):
            yield done.groups
    require_records(report)


def portions(items: Iterable[tuple[Place, Item]]) -> Iterator[Portion]:
    """Items in lists of a size that is worth sending to another process."""
    portion: list[tuple[Place, Item]] = []
    size = 0
    for place, item in items:
        portion.append((place, item))
        size += len(item) if isinstance(item, bytes) else 0
        if len(portion) >= PORTION_ITEMS or size >= PORTION_BYTES:
            yield portion
            portion, size = [], 0
    if portion:
        yield portion


def _num_bytes(portion: Portion) -> int:
    return sum(len(item) + 1 for _, item in portion if isinstance(item, bytes))


def default_num_proc() -> int:
    """The processor cores that this process may use; 1 where processes cannot be forked.

    There a fast tokenizer still uses several threads.
    """
    if not sys.platform.startswith("linux"):
        return 1
    return len(os.sched_getaffinity(0))


def _map_in_order(
    work: PortionTokenizer, todo: Iterator[Portion], num_proc: int
) -> Iterator[Tokenized]:
    if num_proc <= 1:
        yield from map(work, todo)
        return
    method = "fork" if sys.platform.startswith("linux") else None
    pool = ProcessPoolExecutor(
        num_proc, multiprocessing.get_context(method), initializer=_start, initargs=(work,)
    )
    waiting: deque[Future[Tokenized]] = deque()
    try:
        with _single_threaded_tokenizers():
            pool.submit(os.getpid).result()  # starts all of them
        for portion in todo:
            waiting.append(pool.submit(_run, portion))
            if len(waiting) > _AHEAD * num_proc:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise InputError(
            "a tokenising process was ended from outside, perhaps for want of memory; "
            "try fewer of them (num_proc)"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


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


@dataclass
class _Worker:
    """What a worker process holds."""

    work: PortionTokenizer | None = field(default=None)


_worker = _Worker()


def _start(work: PortionTokenizer) -> None:
    """Prepare a worker process."""
    _worker.work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process stops them
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker waits for work for ever, also when the main process was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run(portion: Portion) -> Tokenized:
    assert _worker.work is not None
    return _worker.work(portion)
