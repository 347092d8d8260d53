"""Sizes, largest token and prompt of every group, without touching its tokens.

Checks, splits and packing plans look at all groups of a data set before the first step. For a list
of `Group`s that means every one of them; cached groups (`fastrank.data.cached_groups`) have the
numbers beside the tokens and answer for a million groups in milliseconds. Callers need not know
which of the two they have.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from hashlib import blake2b
from typing import TYPE_CHECKING, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from fastrank.data.group import Group


@dataclass(frozen=True)
class GroupSizes:
    """One entry per group, for N groups.

    Attributes:
        num_candidates: int64 [N].
        num_tokens: int64 [N], with the prompt once: P + sum of R_i.
        longest_sequence: int64 [N], tokens of the longest [prompt; response].
        num_prompt_tokens: int64 [N], P.
        num_labels: int64 [N], ranked tokens of all responses.
        num_pairs: int64 [N], pairs of a token and one that it attends to, with the prompt once:
            P (P + 1) / 2 + sum of R_i P + R_i (R_i + 1) / 2.
    """

    num_candidates: NDArray[np.int64]
    num_tokens: NDArray[np.int64]
    longest_sequence: NDArray[np.int64]
    num_prompt_tokens: NDArray[np.int64]
    num_labels: NDArray[np.int64]
    num_pairs: NDArray[np.int64]

    @classmethod
    def of_lengths(
        cls,
        prompts: NDArray[np.int64],
        responses: NDArray[np.int64],
        num_candidates: NDArray[np.int64],
        num_labels: NDArray[np.int64] | None = None,
    ) -> GroupSizes:
        """From the tokens of every prompt [N] and, group after group, of every response [C]; all
        of a response are ranked unless ``num_labels`` [N] tells."""
        first = np.cumsum(num_candidates) - num_candidates
        pairs = responses * (responses + 1) // 2
        total, longest, own_pairs = (
            function.reduceat(values, first) if len(first) else values
            for function, values in ((np.add, responses), (np.maximum, responses), (np.add, pairs))
        )
        return cls(
            num_candidates=num_candidates,
            num_tokens=prompts + total,
            longest_sequence=prompts + longest,
            num_prompt_tokens=prompts,
            num_labels=total if num_labels is None else num_labels,
            num_pairs=prompts * (prompts + 1) // 2 + prompts * total + own_pairs,
        )

    def __len__(self) -> int:
        return len(self.num_tokens)

    def take(self, index: Sequence[int] | NDArray[np.int64]) -> GroupSizes:
        """The sizes of the groups at these positions, in this order."""
        chosen = np.asarray(index, dtype=np.int64)
        return GroupSizes(*(getattr(self, field.name)[chosen] for field in fields(self)))

    def joined(self, other: GroupSizes) -> GroupSizes:
        """These groups, then the others."""
        pairs = ((getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return GroupSizes(*map(np.concatenate, pairs))

    def pack_tokens(self, shared_prompts: bool) -> NDArray[np.int64]:
        """Tokens of a pack that holds one group alone: int64 [N]."""
        return self.num_tokens if shared_prompts else self.num_candidates * self.longest_sequence


def group_sizes(groups: Sequence[Group]) -> GroupSizes:
    """The sizes of any sequence of groups; stored ones where the sequence has them."""
    stored = getattr(groups, "sizes", None)
    if isinstance(stored, GroupSizes):
        return stored
    return GroupSizes.of_lengths(
        np.array([len(g.prompt_ids) for g in groups], dtype=np.int64),
        np.array([len(ids) for g in groups for ids in g.response_ids], dtype=np.int64),
        np.array([g.num_candidates for g in groups], dtype=np.int64),
        np.array([sum(g.label_counts) for g in groups], dtype=np.int64),
    )


def response_lengths(groups: Sequence[Group], position: int) -> NDArray[np.int64]:
    """Tokens of every response of a group: int64 [n]; a stored group is not read for it."""
    stored = getattr(groups, "response_lengths", None)
    if stored is not None:
        lengths: NDArray[np.int64] = stored(position)
        return lengths
    return np.array([len(ids) for ids in groups[position].response_ids], dtype=np.int64)


def largest_ids(groups: Sequence[Group]) -> NDArray[np.int64]:
    """The largest token id of every group: int64 [N]."""
    stored = getattr(groups, "largest_ids", None)
    if isinstance(stored, np.ndarray):
        return stored
    texts = ((group.prompt_ids, *group.response_ids) for group in groups)
    return np.array([max(int(ids.max()) for ids in group) for group in texts], dtype=np.int64)


def prompt_keys(groups: Sequence[Group]) -> NDArray[np.uint64]:
    """A 64-bit digest of every group's prompt: uint64 [N].

    Two different prompts of a million share one with a probability of 3e-8.
    """
    stored = getattr(groups, "prompt_keys", None)
    if isinstance(stored, np.ndarray):
        return stored
    return np.array([prompt_key(group.prompt_ids.numpy()) for group in groups], dtype=np.uint64)


def tokens_digest(groups: Sequence[Group]) -> str:
    """Digest of the tokens in this order; for cached groups not the one of a list of the same."""
    stored = getattr(groups, "tokens_digest", None)
    if isinstance(stored, str):
        return stored
    digest = blake2b(digest_size=16)
    for group in groups:
        for ids in (group.prompt_ids, *group.marked):
            digest.update(len(ids).to_bytes(8, "little") + ids.numpy().tobytes())
    return digest.hexdigest()


class FlatGroups(NamedTuple):
    """The numbers of G groups with C candidates, group after group."""

    prompt_ids: NDArray[np.integer]
    prompt_lengths: NDArray[np.integer]
    """[G]."""
    response_ids: NDArray[np.integer]
    """`fastrank.data.group.Group.marked`: ``~id`` where a token is not ranked."""
    response_lengths: NDArray[np.integer]
    """[C]."""
    num_candidates: NDArray[np.integer]
    """[G]."""
    rewards: NDArray[np.floating]
    """[C]."""


def flat_parts(groups: Sequence[Group]) -> Iterator[FlatGroups]:
    """All groups, some at a time; the arrays of a cached data set are those of its files."""
    stored = getattr(groups, "flat_parts", None)
    if stored is not None:
        yield from stored()
        return
    for group in groups:
        yield FlatGroups(
            group.prompt_ids.numpy(),
            np.array([len(group.prompt_ids)]),
            np.concatenate([ids.numpy() for ids in group.marked]),
            np.array([len(ids) for ids in group.response_ids]),
            np.array([len(group.response_ids)]),
            group.rewards.numpy(),
        )


def reward_gap(groups: Sequence[Group]) -> float:
    """The largest difference of two rewards of one group; 0 for no group."""
    largest = 0.0
    for part in flat_parts(groups):
        starts = np.cumsum(part.num_candidates) - part.num_candidates
        rewards = part.rewards.astype(np.float64)
        gaps = np.maximum.reduceat(rewards, starts) - np.minimum.reduceat(rewards, starts)
        largest = max(largest, float(gaps.max()))
    return largest


def groups_digest(groups: Sequence[Group]) -> str:
    """Digest of tokens and rewards in this order, as 32 hexadecimal digits: the same for a list of
    groups, for a cached data set of them, and wherever either comes from."""
    from xxhash import xxh3_128

    digests = [xxh3_128() for _ in FlatGroups._fields]
    kinds = ["<f8" if name == "rewards" else "<i4" for name in FlatGroups._fields]
    for part in flat_parts(groups):
        for digest, values, kind in zip(digests, part, kinds, strict=True):
            digest.update(np.ascontiguousarray(values, dtype=kind).data)
    return xxh3_128(b"".join(digest.digest() for digest in digests)).hexdigest()


def prompt_key(ids: NDArray[np.integer]) -> int:
    """The digest of one prompt's token ids."""
    raw = np.ascontiguousarray(ids, dtype="<i8").tobytes()
    return int.from_bytes(blake2b(raw, digest_size=8).digest(), "little")


class GroupView(Sequence["Group"]):
    """Groups that are made when they are asked for. A subclass says how many there are and makes
    one by its position."""

    @abstractmethod
    def group_at(self, position: int) -> Group:
        """The group at a position from 0 to ``len(self) - 1``."""

    def select(self, index: Iterable[int]) -> Sequence[Group]:
        """The groups at these positions, in this order."""
        return [self[i] for i in index]

    @overload
    def __getitem__(self, item: int) -> Group: ...
    @overload
    def __getitem__(self, item: slice) -> Sequence[Group]: ...
    def __getitem__(self, item: int | slice) -> Group | Sequence[Group]:
        if isinstance(item, slice):
            return self.select(range(*item.indices(len(self))))
        return self.group_at(range(len(self))[item])  # negative ones, and the IndexError


def select(groups: Sequence[Group], index: Iterable[int]) -> Sequence[Group]:
    """The groups at these positions, in this order: a view of a cached data set, or a list."""
    view = getattr(groups, "select", None)
    if view is not None:
        chosen: Sequence[Group] = view(index)
        return chosen
    return [groups[i] for i in index]
