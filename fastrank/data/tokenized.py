"""Tokenised groups as flat arrays: what the tokenising processes give and what the cache holds.

A `Group` is five or more tensors, some kilobytes of objects around its tokens, and travels slowly
between processes. Here a thousand groups are seven arrays, and `Group`s are made when asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fastrank.data.columns import prompt_key
from fastrank.data.tokenize import Encoded

if TYPE_CHECKING:
    from fastrank.data.group import Group


@dataclass(frozen=True, eq=False)
class TokenizedGroups:
    """G groups with C candidates; group g consists of 1 + n_g texts, its prompt and responses."""

    ids: NDArray[np.int32]
    """Token ids, text after text, group after group."""
    cu_ids: NDArray[np.int64]
    """[G + 1]: group g owns ``ids[cu_ids[g] : cu_ids[g + 1]]``."""
    lengths: NDArray[np.int32]
    """[G + C]: tokens of each text; a group's prompt comes first."""
    cu_texts: NDArray[np.int64]
    """[G + 1]: group g owns ``lengths[cu_texts[g] : cu_texts[g + 1]]``."""
    rewards: NDArray[np.float32]
    """[C]: group g owns ``rewards[cu_texts[g] - g : cu_texts[g + 1] - (g + 1)]``."""
    lines: NDArray[np.int64]
    """[G]: line or number of the record in its file."""
    prompt_keys: NDArray[np.uint64]
    """[G]: see `fastrank.data.columns.prompt_keys`."""

    @classmethod
    def from_encoded(
        cls, encoded: Sequence[Encoded], rewards: Sequence[Sequence[float]], lines: Sequence[int]
    ) -> TokenizedGroups:
        """From token ids as lists; the three sequences have one entry a group."""
        ids: list[int] = []
        lengths: list[int] = []
        cu_ids, cu_texts, keys = [0], [0], []
        for prompt, responses in encoded:
            for text in (prompt, *responses):
                ids.extend(text)
                lengths.append(len(text))
            cu_ids.append(len(ids))
            cu_texts.append(len(lengths))
            keys.append(prompt_key(np.array(prompt)))
        return cls(
            np.array(ids, dtype=np.int32),
            np.array(cu_ids),
            np.array(lengths, dtype=np.int32),
            np.array(cu_texts),
            np.array([value for values in rewards for value in values], dtype=np.float32),
            np.array(lines, dtype=np.int64),
            np.array(keys, dtype=np.uint64),
        )

    def __len__(self) -> int:
        return len(self.lines)

    def group(self, number: int, file: str) -> Group:
        """One group, with copies of its numbers, named after its place in ``file``."""
        import torch

        from fastrank.data.group import Group

        first, last = self.cu_texts[number], self.cu_texts[number + 1]
        ids = self.ids[self.cu_ids[number] : self.cu_ids[number + 1]].astype(np.int64)
        prompt, *responses = torch.from_numpy(ids).split(self.lengths[first:last].tolist())
        rewards = self.rewards[first - number : last - number - 1].copy()
        name = f"{file}:{self.lines[number]}"
        return Group(prompt, tuple(responses), torch.from_numpy(rewards), name=name)
