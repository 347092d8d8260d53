"""A data set of groups in a memory-mapped Arrow file.

Tokens stay in the file and in the system's page cache, which gives them up when memory is short;
a `Group` is made when its index is asked for. Sizes, largest ids and prompt keys, 40 bytes a group,
are held once they were asked for. The file is in Arrow's stream format, as `datasets` writes it:
``datasets.Dataset.from_file`` opens it too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fastrank.data.columns import GroupSizes
from fastrank.data.identity import content_hash
from fastrank.data.tokenized import TokenizedGroups

if TYPE_CHECKING:
    from fastrank.data.group import Group

SCHEMA = pa.schema(
    {
        "ids": pa.list_(pa.int32()),
        "lengths": pa.list_(pa.int32()),
        "rewards": pa.list_(pa.float32()),
        "line": pa.int64(),
        "prompt_key": pa.uint64(),
        "num_tokens": pa.int32(),
        "longest_sequence": pa.int32(),
        "largest_id": pa.int32(),
    }
)


def record_batch(groups: TokenizedGroups) -> pa.RecordBatch:
    """Groups as rows of the file; the last four columns are worked out from the others."""
    number = np.arange(len(groups) + 1)
    first = groups.cu_texts[:-1]
    candidates_only = groups.lengths.copy()
    candidates_only[first] = 0
    longest = groups.lengths[first] + np.maximum.reduceat(candidates_only, first)
    columns = [
        _lists(groups.ids, groups.cu_ids),
        _lists(groups.lengths, groups.cu_texts),
        _lists(groups.rewards, groups.cu_texts - number),
        pa.array(groups.lines),
        pa.array(groups.prompt_keys),
        pa.array(np.diff(groups.cu_ids).astype(np.int32)),
        pa.array(longest.astype(np.int32)),
        pa.array(np.maximum.reduceat(groups.ids, groups.cu_ids[:-1])),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def _lists(values: NDArray[Any], offsets: NDArray[np.int64]) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(values))


class MappedFile:
    """An Arrow file of groups, opened.

    Raises:
        OSError, pyarrow.ArrowInvalid: the file is not there or not whole.
    """

    def __init__(self, path: str | Path) -> None:
        from datasets import Dataset

        self.path = Path(path)
        self.table: pa.Table = Dataset.from_file(str(path)).data.table
        self.parts = [_tokenized(batch) for batch in self.table.to_batches()]
        self.starts = np.cumsum([0, *map(len, self.parts)])

    def group(self, row: int, source: str) -> Group:
        part = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.parts[part].group(row - int(self.starts[part]), source)


class GroupTable(Sequence["Group"]):
    """The groups of a file written with `record_batch`es, or some of them.

    Args:
        file: the opened file.
        source: the name of the records' file, for the names of the groups.
        index: positions in the file of the groups to show, in this order; None for all.

    A copy sent to another process opens the file again.
    """

    def __init__(
        self, file: MappedFile, source: str, index: NDArray[np.int64] | None = None
    ) -> None:
        self.file = file
        self.source = source
        self._index = index

    @classmethod
    def open(
        cls, path: str | Path, source: str, index: NDArray[np.int64] | None = None
    ) -> GroupTable:
        return cls(MappedFile(path), source, index)

    def __reduce__(self) -> tuple[Any, ...]:
        return GroupTable.open, (self.file.path, self.source, self._index)

    def __len__(self) -> int:
        return int(self.file.starts[-1]) if self._index is None else len(self._index)

    @overload
    def __getitem__(self, item: int) -> Group: ...
    @overload
    def __getitem__(self, item: slice) -> GroupTable: ...
    def __getitem__(self, item: int | slice) -> Group | GroupTable:
        if isinstance(item, slice):
            return self.select(range(*item.indices(len(self))))
        position = range(len(self))[item]  # negative ones, and the IndexError
        row = position if self._index is None else int(self._index[position])
        return self.file.group(row, self.source)

    def __iter__(self) -> Iterator[Group]:
        return (self[i] for i in range(len(self)))

    def select(self, index: Iterable[int]) -> GroupTable:
        """The groups at these positions, in this order, over the same mapped file."""
        chosen = np.fromiter(index, dtype=np.int64)
        if len(chosen) and not 0 <= chosen.min() <= chosen.max() < len(self):
            raise IndexError(
                f"index must lie in [0, {len(self)}), got {chosen.min()} to {chosen.max()}"
            )
        index = chosen if self._index is None else self._index[chosen]
        return GroupTable(self.file, self.source, index)

    @cached_property
    def sizes(self) -> GroupSizes:
        """See `fastrank.data.columns.group_sizes`."""
        texts = [np.diff(part.cu_texts) for part in self.file.parts]
        num_texts = np.concatenate(texts) if texts else np.empty(0, dtype=np.int64)
        return GroupSizes(
            num_candidates=self._chosen(num_texts - 1).astype(np.int64),
            num_tokens=self._column("num_tokens").astype(np.int64),
            longest_sequence=self._column("longest_sequence").astype(np.int64),
        )

    @cached_property
    def largest_ids(self) -> NDArray[np.int64]:
        """See `fastrank.data.columns.largest_ids`."""
        return self._column("largest_id").astype(np.int64)

    @cached_property
    def prompt_keys(self) -> NDArray[np.uint64]:
        """See `fastrank.data.columns.prompt_keys`."""
        return self._column("prompt_key")

    @cached_property
    def tokens_digest(self) -> str:
        """See `fastrank.data.columns.tokens_digest`. Of the name of the cache entry, which stands
        for all that its tokens were made from, a sample of the file, and the chosen positions."""
        digest = blake2b(self.file.path.absolute().parent.name.encode(), digest_size=16)
        digest.update(content_hash(self.file.path).encode())
        if self._index is not None:
            digest.update(self._index.tobytes())
        return digest.hexdigest()

    def _column(self, name: str) -> NDArray[Any]:
        return self._chosen(self.file.table.column(name).to_numpy())

    def _chosen(self, values: NDArray[Any]) -> NDArray[Any]:
        return values if self._index is None else values[self._index]


def _tokenized(batch: pa.RecordBatch) -> TokenizedGroups:
    """The rows of a batch, as arrays over its memory."""
    ids, lengths, rewards = (batch.column(name) for name in ("ids", "lengths", "rewards"))
    return TokenizedGroups(
        ids=ids.values.to_numpy(),
        cu_ids=ids.offsets.to_numpy(),
        lengths=lengths.values.to_numpy(),
        cu_texts=lengths.offsets.to_numpy(),
        rewards=rewards.values.to_numpy(),
        lines=batch.column("line").to_numpy(),
        prompt_keys=batch.column("prompt_key").to_numpy(),
    )
