"""Packs of some of the candidates of some groups, and the way back to all of them.

A ranking loss needs all candidates of a prompt *at once* only for its scores. When scores and
gradients are made in separate passes, a pass may hold any candidates in any order: here a prompt
whose candidates do not fit into one pack is encoded again in each of several, and candidates that
are not wanted are left out. Candidates are numbered through all groups, in the given order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastrank.arguments import check_count
from fastrank.data.bins import best_fit
from fastrank.data.packing import Group, Pack, offsets, pack


class CandidatePack(NamedTuple):
    """A pack of chosen candidates."""

    pack: Pack
    tokens: Tensor
    """int64 [T of the pack] on the host: the place of each of its labels among those of all
    candidates of all groups."""


@dataclass(frozen=True)
class Part:
    """Some candidates of a group, as a group.

    Attributes:
        group: the prompt with these candidates.
        index: the whole group's place in the list given.
        members: the candidates' places in it.
    """

    group: Group
    index: int
    members: tuple[int, ...]


class Candidates(NamedTuple):
    """All candidates of some groups, one after the other: C candidates, T ranked tokens."""

    rewards: Tensor
    """float32 or float64 [C]."""
    reference_scores: Tensor | None
    """float32 [C]."""
    cu_responses: Tensor
    """int32 [C + 1] on the host."""
    cu_groups: Tensor
    """int32 [G + 1] on the host."""
    group_index: tuple[int, ...]
    """The groups' positions, by default in the list given."""
    sequence_lengths: tuple[int, ...]
    """Tokens of every [prompt; response], one per candidate."""
    num_tokens: int
    """Tokens of all groups in packs that split none, without padding."""

    @classmethod
    def of(cls, groups: Sequence[Group], shared_prompts: bool = True) -> Candidates:
        """Raises ValueError if some groups have reference scores and others have none."""
        references = [g.reference_scores for g in groups if g.reference_scores is not None]
        if len(references) not in (0, len(groups)):
            raise ValueError(
                f"reference_scores must be given for every group or for none, got "
                f"{len(references)} of {len(groups)} groups"
            )
        return cls(
            rewards=torch.cat([g.rewards for g in groups]) if groups else torch.empty(0),
            reference_scores=torch.cat(references) if references else None,
            cu_responses=offsets([number for group in groups for number in group.label_counts]),
            cu_groups=offsets([group.num_candidates for group in groups]),
            group_index=tuple(range(len(groups))),
            sequence_lengths=tuple(
                len(group.prompt_ids) + len(ids) for group in groups for ids in group.response_ids
            ),
            num_tokens=sum(
                group.num_tokens_shared if shared_prompts else group.num_tokens_separate
                for group in groups
            ),
        )

    @property
    def num_response_tokens(self) -> int:
        return int(self.cu_responses[-1])


def candidate_packs(
    groups: Sequence[Group],
    *,
    max_tokens: int,
    shared_prompts: bool = True,
    live: Sequence[bool] | None = None,
    vocab_size: int | None = None,
) -> list[CandidatePack]:
    """Packs of at most ``max_tokens`` tokens that hold every live candidate once.

    A group whose live candidates do not fit into one pack is cut into as few parts as best fit
    finds, each with the prompt. Depends on the arguments alone.

    Args:
        groups: may be none, which gives no pack.
        max_tokens: the budget of a pack, as for `fastrank.pack`.
        shared_prompts: as for `fastrank.pack`.
        live: which candidates to hold, one value per candidate through all groups; None for all.
        vocab_size: if given, every token id must lie below it.

    Raises:
        ValueError: a candidate that does not fit into a pack together with its prompt.
    """
    parts = split_groups(groups, max_tokens=max_tokens, shared_prompts=shared_prompts, live=live)
    begins = _token_offsets(groups)
    tokens = [
        torch.cat([torch.arange(*begins[part.index][i : i + 2]) for i in part.members])
        for part in parts
    ]
    packs = pack(
        [part.group for part in parts],
        max_tokens=max_tokens,
        shared_prompts=shared_prompts,
        vocab_size=vocab_size,
    )
    return [CandidatePack(p, torch.cat([tokens[i] for i in p.group_index])) for p in packs]


def split_groups(
    groups: Sequence[Group],
    *,
    max_tokens: int,
    shared_prompts: bool = True,
    live: Sequence[bool] | None = None,
) -> list[Part]:
    """Groups of the live candidates, cut where they do not fit into one pack; arguments and errors
    as for `candidate_packs`. Without shared prompts every candidate is a part: nothing is shared,
    and rows of like length can go together."""
    check_count("max_tokens", max_tokens)
    parts: list[Part] = []
    first = 0
    for index, group in enumerate(groups):
        name = group.name or f"group {index}"
        wanted = [i for i in range(group.num_candidates) if live is None or live[first + i]]
        for members in _fit(group, name, wanted, max_tokens, shared_prompts):
            chosen = replace(group.take(members), name=name)
            parts.append(Part(chosen, index, tuple(members)))
        first += group.num_candidates
    return parts


def filler_pack(shared_prompts: bool) -> CandidatePack:
    """The smallest pack there is, of no candidate: for a process that has none left while others
    do, since engines that communicate inside forward and backward wait for each other."""
    group = Group([0], ([0],), [0.0], [0.0], name="filler")  # type: ignore[arg-type]
    (smallest,) = pack([group], max_tokens=2, shared_prompts=shared_prompts)
    return CandidatePack(smallest, torch.empty(0, dtype=torch.int64))


def _fit(
    group: Group, name: str, members: list[int], max_tokens: int, shared_prompts: bool
) -> list[list[int]]:
    """The members, in parts that fit into a pack."""
    room = max_tokens - len(group.prompt_ids)
    lengths = [len(group.response_ids[i]) for i in members]
    if lengths and max(lengths) > room:
        too_long = members[lengths.index(max(lengths))]
        raise ValueError(
            f"{name}: prompt and response {too_long} must fit into max_tokens={max_tokens}, got "
            f"{len(group.prompt_ids)} + {max(lengths)} tokens"
        )
    if not shared_prompts:
        return [[i] for i in members]
    if sum(lengths) <= room:
        return [members] if members else []
    return [[members[i] for i in chosen] for chosen in best_fit(lengths, room)]


def _token_offsets(groups: Sequence[Group]) -> list[list[int]]:
    """Of every group: where each of its responses begins among all labels, and the end."""
    begins, start = [], 0
    for group in groups:
        ends = (start + np.cumsum(group.label_counts)).tolist()
        begins.append([start, *ends])
        start = ends[-1]
    return begins
