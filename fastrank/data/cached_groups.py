"""Groups in memory-mapped Arrow files, written and opened by `datasets`.

Tokens stay in the files and in the system's page cache, which gives them up when memory is short;
a `Group` is made when its index is asked for. Sizes come from the files' offsets, largest ids and
prompt keys are stored; all of them, 40 bytes per group, are held once they were asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from fastrank.data.columns import FlatGroups, GroupSizes, prompt_key
from fastrank.data.files import content_hash
from fastrank.data.records import Record
from fastrank.data.tokenize import Encoded

if TYPE_CHECKING:
    from datasets import Dataset, Features

    from fastrank.data.group import Group

#: Types of the columns; "prompt_key" holds the bits of an unsigned number.
COLUMNS = {
    "prompt_ids": ["int32"],
    "response_ids": [["int32"]],
    "rewards": ["float32"],
    "line": "int64",
    "prompt_key": "int64",
    "largest_id": "int32",
}


def features() -> Features:
    """The columns as `datasets` describes them."""
    from datasets import Features, List, Value

    def feature(kind: Any) -> Any:
        return Value(kind) if isinstance(kind, str) else List(feature(kind[0]))

    return Features({name: feature(kind) for name, kind in COLUMNS.items()})


def as_row(record: Record, encoded: Encoded) -> dict[str, Any]:
    """A tokenised record as a row of the files."""
    prompt, responses = encoded
    key = prompt_key(np.array(prompt))
    return {
        "prompt_ids": prompt,
        "response_ids": responses,
        "rewards": record.scores,
        "line": record.line,
        "prompt_key": key - (1 << 64) if key >> 63 else key,
        "largest_id": max(max(prompt), *map(max, responses)),
    }


class CachedGroups(Sequence["Group"]):
    """The groups of a cache entry, or some of them.

    A copy sent to another process opens the files again.

    Args:
        folder: holds ``*.arrow`` files of `as_row`s, in the order of their names.
        source: the name of the records' file, for the names of the groups.
        index: positions in the files of the groups to show, in this order; None for all.
        dataset: the files, if they are open already.

    Raises:
        OSError, ValueError, pyarrow.ArrowException: a file is not there or not whole.

    Attributes:
        dataset: all rows, as a `datasets.Dataset`.
    """

    def __init__(
        self,
        folder: str | Path,
        source: str,
        index: NDArray[np.int64] | None = None,
        *,
        dataset: Dataset | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.source = source
        self.dataset = _open(self.folder) if dataset is None else dataset
        self._index = index

    def __reduce__(self) -> tuple[Any, ...]:
        return CachedGroups, (self.folder, self.source, self._index)

    def __len__(self) -> int:
        return len(self.dataset) if self._index is None else len(self._index)

    @overload
    def __getitem__(self, item: int) -> Group: ...
    @overload
    def __getitem__(self, item: slice) -> CachedGroups: ...
    def __getitem__(self, item: int | slice) -> Group | CachedGroups:
        if isinstance(item, slice):
            return self.select(range(*item.indices(len(self))))
        position = range(len(self))[item]  # negative ones, and the IndexError
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
        return CachedGroups(self.folder, self.source, rows, dataset=self.dataset)

    @cached_property
    def _texts(self) -> list[Any]:
        return [self.dataset.data.column(name) for name in list(COLUMNS)[:4]]

    def _group(self, row: int) -> Group:
        """One group, with copies of its numbers."""
        import torch

        from fastrank.data.group import Group

        prompt, responses, rewards, line = (column[row] for column in self._texts)
        ids = torch.from_numpy(responses.values.flatten().to_numpy().astype(np.int64))
        return Group(
            torch.from_numpy(prompt.values.to_numpy().astype(np.int64)),
            ids.split(responses.values.value_lengths().to_pylist()),
            torch.from_numpy(rewards.values.to_numpy().copy()),
            name=f"{self.source}:{line}",
        )

    @cached_property
    def sizes(self) -> GroupSizes:
        """See `fastrank.data.columns.group_sizes`."""
        import pyarrow.compute as pc

        prompts, responses, _, _ = self._texts
        prompt_tokens = pc.list_value_length(prompts).to_numpy().astype(np.int64)
        count = pc.list_value_length(responses).to_numpy().astype(np.int64)
        tokens = pc.list_value_length(pc.list_flatten(responses)).to_numpy().astype(np.int64)
        first = np.cumsum(count) - count
        sums, longest = (
            function.reduceat(tokens, first) if len(first) else tokens
            for function in (np.add, np.maximum)
        )
        columns = (count, prompt_tokens + sums, prompt_tokens + longest)
        return GroupSizes(*(self._chosen(column) for column in columns))

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
        for file in _files(self.folder):
            digest.update(content_hash(file).encode())
        if self._index is not None:
            digest.update(self._index.tobytes())
        return digest.hexdigest()

    def flat_parts(self) -> Iterator[FlatGroups]:
        """See `fastrank.data.columns.flat_parts`: stretches of neighbours, without copies."""
        columns = [self.dataset.data.column(name) for name in list(COLUMNS)[:3]]
        chunks = list(zip(*(column.chunks for column in columns), strict=True))
        starts = np.cumsum([0, *(len(prompts) for prompts, _, _ in chunks)])
        rows = np.arange(len(self)) if self._index is None else self._index
        chunk_of = np.searchsorted(starts, rows, side="right") - 1
        breaks = np.flatnonzero((np.diff(rows) != 1) | (np.diff(chunk_of) != 0)) + 1
        opened, at = None, -1
        for stretch in np.split(np.arange(len(rows)), breaks) if len(rows) else ():
            chunk = int(chunk_of[stretch[0]])
            if opened is None or chunk != at:
                opened, at = _FlatChunk(*chunks[chunk]), chunk
            first = int(rows[stretch[0]] - starts[chunk])
            yield opened.groups(first, first + len(stretch))

    def _column(self, name: str) -> NDArray[np.int64]:
        return self._chosen(self.dataset.data.column(name).to_numpy()).astype(np.int64)

    def _chosen(self, values: NDArray[Any]) -> NDArray[Any]:
        return values if self._index is None else values[self._index]


class _FlatChunk:
    """A chunk of the files as NumPy arrays over its memory."""

    def __init__(self, prompts: Any, responses: Any, rewards: Any) -> None:
        self._prompts = (prompts.offsets.to_numpy(), prompts.values.to_numpy())
        self._candidates = responses.offsets.to_numpy()
        self._responses = (responses.values.offsets.to_numpy(), responses.values.values.to_numpy())
        self._rewards = (rewards.offsets.to_numpy(), rewards.values.to_numpy())

    def groups(self, start: int, stop: int) -> FlatGroups:
        """The groups from ``start`` to ``stop``."""
        candidates = self._candidates[start : stop + 1]
        prompts, lengths = _some_lists(*self._prompts, start, stop)
        responses, response_lengths = _some_lists(*self._responses, *candidates[[0, -1]])
        rewards, num_candidates = _some_lists(*self._rewards, start, stop)
        return FlatGroups(prompts, lengths, responses, response_lengths, num_candidates, rewards)


def _some_lists(
    offsets: NDArray[Any], values: NDArray[Any], start: int, stop: int
) -> tuple[NDArray[Any], NDArray[Any]]:
    """The values of the lists from ``start`` to ``stop``, and the lists' lengths."""
    edges = offsets[start : stop + 1]
    return values[edges[0] : edges[-1]], np.diff(edges)


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.arrow"))


def _open(folder: Path) -> Dataset:
    from datasets import Dataset, concatenate_datasets

    return concatenate_datasets([Dataset.from_file(str(file)) for file in _files(folder)])
