"""Groups in memory-mapped Arrow files, as `datasets` writes and opens them.

Tokens stay in the files and in the system's page cache, which gives them up when memory is short;
a `Group` is made when its index is asked for. Sizes come from the files' offsets, largest ids and
prompt keys are stored; all of them, 40 bytes per group, are held once they were asked for.

Memory that is mapped from a file which shrinks ends the process without a word (SIGBUS) when it is
touched. So the files' sizes are looked at before: half a microsecond per file and group.
"""

from __future__ import annotations

import os
from bisect import bisect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from hashlib import blake2b
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastrank.data.columns import FlatGroups, GroupSizes, GroupView, prompt_key
from fastrank.data.manifest import content_hash
from fastrank.data.records import Record, narrowed
from fastrank.data.tokenize import Encoded, joined
from fastrank.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

    from fastrank.data.group import Group

#: The columns in the files' order; "prompt_key" holds the bits of an unsigned number.
COLUMNS = ("prompt_ids", "response_ids", "rewards", "line", "prompt_key", "largest_id")


@contextmanager
def group_writer(path: Path) -> Iterator[Callable[[Sequence[tuple[Record, Encoded]]], None]]:
    """A function that adds a batch of tokenised records to a new file.

    Raises:
        OSError: the file cannot be written.
    """
    import pyarrow as pa

    ids = pa.list_(pa.int32())
    types = (ids, pa.list_(ids), pa.list_(pa.float32()), pa.int64(), pa.int64(), pa.int32())
    schema = pa.schema(list(zip(COLUMNS, types, strict=True)))
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as stream:

        def write(batch: Sequence[tuple[Record, Encoded]]) -> None:
            columns = _columns([record for record, _ in batch], [ids for _, ids in batch])
            stream.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))

        yield write


def _columns(records: Sequence[Record], encoded: Sequence[Encoded]) -> list[pa.Array]:
    """The columns of a batch; its tokens are handed over whole, which takes half of the time that
    Arrow takes to look at lists of lists."""
    import pyarrow as pa

    own = [prompt for prompt, _ in encoded]
    several = [responses for _, responses in encoded]
    texts = [*chain.from_iterable(several)]
    prompts, responses = joined(own), joined(texts)
    prompt_starts, starts, rows = _begins(own), _begins(texts), _begins(several)
    if any((np.diff(begins) < 1).any() for begins in (prompt_starts, starts, rows)):
        raise ValueError("a prompt and every response must have tokens")  # reduceat needs them
    # Ids that are not ranked are stored as ~id.
    largest = np.maximum(
        np.maximum.reduceat(prompts, prompt_starts[:-1]),
        np.maximum.reduceat(np.maximum(responses, ~responses), starts[rows[:-1]]),
    )
    keys = [prompt_key(prompts[a:b]) for a, b in pairwise(prompt_starts)]
    return [
        _list_array(prompt_starts, prompts),
        _list_array(rows, _list_array(starts, responses)),
        pa.array([narrowed(record.scores) for record in records], pa.list_(pa.float32())),
        pa.array([record.line for record in records], pa.int64()),
        pa.array(np.array(keys, dtype=np.uint64).view(np.int64)),
        pa.array(largest.astype(np.int32)),
    ]


def _begins(lists: Sequence[Sequence[Any]]) -> NDArray[np.int64]:
    """Where each list begins in a row of all of them, and where the last one ends."""
    return np.cumsum([0, *map(len, lists)])


def _list_array(starts: NDArray[np.int64], values: Any) -> pa.Array:
    import pyarrow as pa

    inner = values if isinstance(values, pa.Array) else pa.array(values.astype(np.int32))
    return pa.ListArray.from_arrays(pa.array(starts.astype(np.int32)), inner)


class CachedGroups(GroupView):
    """The groups of a cache entry, or some of them.

    A copy sent to another process opens the files again.

    Args:
        folder: holds ``*.arrow`` files of a `group_writer`, in the order of their names.
        source: the name of the records' file, for the names of the groups.
        index: positions in the files of the groups to show, in this order; None for all.
        masked: whether some groups have tokens that are not ranked; sizes count them then.
        opened: the files, if they are open already.

    Raises:
        OSError, ValueError, pyarrow.ArrowException: a file is not there or not whole.
        InputError: when groups are asked for, a file has shrunk since it was opened.
    """

    def __init__(
        self,
        folder: str | Path,
        source: str,
        index: NDArray[np.int64] | None = None,
        masked: bool = False,
        *,
        opened: _Opened | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.source = source
        self._opened = _Opened(self.folder) if opened is None else opened
        self.masked = masked
        self._index = index

    @property
    def dataset(self) -> Dataset:
        """All rows of the files, as a `datasets.Dataset`."""
        return self._opened.dataset

    def __reduce__(self) -> tuple[Any, ...]:
        return CachedGroups, (self.folder, self.source, self._index, self.masked)

    def __len__(self) -> int:
        return len(self.dataset) if self._index is None else len(self._index)

    def group_at(self, position: int) -> Group:
        return self._group(position if self._index is None else int(self._index[position]))

    def __iter__(self) -> Iterator[Group]:
        return (self[i] for i in range(len(self)))

    def select(self, index: Iterable[int]) -> CachedGroups:
        """The groups at these positions, in this order, over the same mapped files."""
        chosen = np.fromiter(index, dtype=np.int64)
        if len(chosen) and not 0 <= chosen.min() <= chosen.max() < len(self):
            raise IndexError(
                f"index must lie in [0, {len(self)}), got {chosen.min()} to {chosen.max()}"
            )
        rows = chosen if self._index is None else self._index[chosen]
        return CachedGroups(self.folder, self.source, rows, self.masked, opened=self._opened)

    @cached_property
    def _chunks(self) -> list[_Chunk]:
        columns = [self.dataset.data.column(name).chunks for name in COLUMNS[:4]]
        return [_Chunk(*arrays) for arrays in zip(*columns, strict=True)]

    @cached_property
    def _starts(self) -> list[int]:
        """[number of chunks + 1]: the first row of each, and the number of rows."""
        return [0, *accumulate(len(chunk) for chunk in self._chunks)]

    def _place(self, row: int) -> tuple[_Chunk, int]:
        """The chunk that holds a row, and the row's number in it."""
        self._opened.check_sizes()
        number = bisect(self._starts, row) - 1
        return self._chunks[number], row - self._starts[number]

    def _group(self, row: int) -> Group:
        """One group, with copies of its numbers."""
        import torch

        from fastrank.data.group import Group

        chunk, at = self._place(row)
        found = chunk.groups(at, at + 1)
        prompt = torch.from_numpy(found.prompt_ids.astype(np.int64))
        responses = torch.from_numpy(found.response_ids.astype(np.int64))
        split = responses.split(found.response_lengths.tolist())
        rewards = torch.from_numpy(found.rewards.copy())
        name = f"{self.source}:{chunk.lines[at]}"
        if self.masked:
            return Group.of_marked(prompt, split, rewards, name)
        return Group(prompt, split, rewards, name=name)

    @cached_property
    def sizes(self) -> GroupSizes:
        """See `fastrank.data.columns.group_sizes`."""
        import pyarrow.compute as pc

        self._opened.check_sizes()
        prompts, responses = (self.dataset.data.column(name) for name in COLUMNS[:2])
        prompt_tokens = pc.list_value_length(prompts).to_numpy().astype(np.int64)
        count = pc.list_value_length(responses).to_numpy().astype(np.int64)
        tokens = pc.list_value_length(pc.list_flatten(responses)).to_numpy().astype(np.int64)
        labels = self._count_labels() if self.masked else None
        sizes = GroupSizes.of_lengths(prompt_tokens, tokens, count, labels)
        return sizes if self._index is None else sizes.take(self._index)

    def response_lengths(self, position: int) -> NDArray[np.int64]:
        """See `fastrank.data.columns.response_lengths`."""
        chunk, at = self._place(position if self._index is None else int(self._index[position]))
        return chunk.groups(at, at + 1).response_lengths.astype(np.int64)

    def _count_labels(self) -> NDArray[np.int64]:
        """Ranked tokens of every group of the files, which are read for it."""
        counts = []
        for chunk in self._chunks:
            found = chunk.groups(0, len(chunk))
            group_of_response = np.repeat(np.arange(len(chunk)), found.num_candidates)
            group_of_token = np.repeat(group_of_response, found.response_lengths)
            ranked = group_of_token[found.response_ids >= 0]
            counts.append(np.bincount(ranked, minlength=len(chunk)))
        return np.concatenate(counts)

    @cached_property
    def largest_ids(self) -> NDArray[np.int64]:
        """See `fastrank.data.columns.largest_ids`."""
        return self._column("largest_id")

    @cached_property
    def prompt_keys(self) -> NDArray[np.uint64]:
        """See `fastrank.data.columns.prompt_keys`."""
        return self._column("prompt_key").view(np.uint64)

    @cached_property
    def tokens_digest(self) -> str:
        """See `fastrank.data.columns.tokens_digest`. Of the name of the cache entry, which stands
        for all that its tokens were made from, samples of the files, and the chosen positions."""
        digest = blake2b(self.folder.absolute().name.encode(), digest_size=16)
        for file in group_files(self.folder):
            digest.update(content_hash(file).encode())
        if self._index is not None:
            digest.update(self._index.tobytes())
        return digest.hexdigest()

    def flat_parts(self) -> Iterator[FlatGroups]:
        """See `fastrank.data.columns.flat_parts`: stretches of neighbours, without copies."""
        rows = np.arange(len(self)) if self._index is None else self._index
        chunk_of = np.searchsorted(self._starts, rows, side="right") - 1
        breaks = np.flatnonzero((np.diff(rows) != 1) | (np.diff(chunk_of) != 0)) + 1
        for stretch in np.split(np.arange(len(rows)), breaks) if len(rows) else ():
            chunk = int(chunk_of[stretch[0]])
            first = int(rows[stretch[0]]) - self._starts[chunk]
            self._opened.check_sizes()
            yield self._chunks[chunk].groups(first, first + len(stretch))

    def _column(self, name: str) -> NDArray[np.int64]:
        self._opened.check_sizes()
        return self._chosen(self.dataset.data.column(name).to_numpy()).astype(np.int64)

    def _chosen(self, values: NDArray[Any]) -> NDArray[Any]:
        return values if self._index is None else values[self._index]


class _Chunk:
    """A chunk of the files as NumPy arrays over its memory, made when it is first asked for."""

    def __init__(self, prompts: Any, responses: Any, rewards: Any, lines: Any) -> None:
        self._arrays = (prompts, responses, rewards, lines)

    def __len__(self) -> int:
        return len(self._arrays[0])

    @cached_property
    def lines(self) -> NDArray[np.int64]:
        """[G]: lines of the records."""
        return np.asarray(self._arrays[3])

    @cached_property
    def _lists(self) -> list[tuple[NDArray[Any], NDArray[Any]]]:
        """Offsets and values of the prompts, of the responses and of the rewards."""
        prompts, responses, rewards, _ = self._arrays
        lists = (prompts, responses.values, rewards)
        return [(array.offsets.to_numpy(), array.values.to_numpy()) for array in lists]

    @cached_property
    def _candidates(self) -> NDArray[np.int32]:
        """[G + 1]: the first response of each group."""
        return np.asarray(self._arrays[1].offsets)

    def groups(self, start: int, stop: int) -> FlatGroups:
        """The groups from ``start`` to ``stop``."""
        prompts, responses, rewards = self._lists
        candidates = self._candidates[start : stop + 1]
        prompt_ids, prompt_lengths = _some_lists(*prompts, start, stop)
        response_ids, lengths = _some_lists(*responses, candidates[0], candidates[-1])
        values, num_candidates = _some_lists(*rewards, start, stop)
        return FlatGroups(prompt_ids, prompt_lengths, response_ids, lengths, num_candidates, values)


def _some_lists(
    offsets: NDArray[Any], values: NDArray[Any], start: int, stop: int
) -> tuple[NDArray[Any], NDArray[Any]]:
    """The values of the lists from ``start`` to ``stop``, and the lists' lengths."""
    edges = offsets[start : stop + 1]
    return values[edges[0] : edges[-1]], edges[1:] - edges[:-1]


def group_files(folder: Path) -> list[Path]:
    """The files of a `group_writer` in a folder, in their order."""
    return sorted(folder.glob("*.arrow"))


class _Opened:
    """The files of a folder, mapped into memory."""

    def __init__(self, folder: Path) -> None:
        from datasets import Dataset, concatenate_datasets

        files = group_files(folder)
        self._files = [file.open("rb") for file in files]
        self._sizes = [os.fstat(file.fileno()).st_size for file in self._files]
        self.dataset = concatenate_datasets([Dataset.from_file(str(file)) for file in files])

    def check_sizes(self) -> None:
        """Raise `InputError` if a file is no longer as long as it was."""
        for file, size in zip(self._files, self._sizes, strict=True):
            if os.fstat(file.fileno()).st_size < size:
                raise InputError(
                    f"{file.name}: a file of the cache has shrunk while it was in use; start again"
                )
