"""Groups of candidates, and the packs that a model reads.

A `Group` is one prompt with its tokenised candidates. `pack` puts whole groups into `Pack`s of at
most ``max_tokens`` tokens: with shared prompts a pack is one row ``[prompt_a | a1 | a2 | prompt_b |
b1 | ...]`` in which every prompt stands once; without, every response is a right-padded row
``[prompt; response]`` of its own, which recurrent models need.

Groups are never split here: a ranking loss needs all candidates of a prompt (training in two phases
splits larger ones).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fastrank.arguments import check_count
from fastrank.attention.segments import SegmentTable
from fastrank.data.bins import best_fit, fill_padded
from fastrank.data.group import Group, check_groups
from fastrank.outputs import Opaque
from fastrank_kernels.host_memory import send

__all__ = ["Group", "Pack", "pack", "sharing_pays"]

SHARING_PAYS_FROM = 1.08  # tokens of padded rows over tokens of shared rows
PAD_TOKEN = 0  # fills padded rows; no label and no attended position ever reads it


class Pack(Opaque):
    """Whole groups, laid out for one forward pass: C candidates in G groups, T response tokens.

    Engines that cast the arguments of a forward leave it as it is (`fastrank.outputs.Opaque`).

    Attributes:
        input_ids: int64 [1, N] with shared prompts, else [C, L] padded on the right.
        position_ids: int64, as input_ids; a token's position in its own [prompt; response].
        rows: int64 [T], the row of ``hidden.view(-1, D)`` that predicts each label.
        labels: int64 [T], the ranked response tokens, response after response.
        rewards: float32 or float64 [C].
        reference_scores: float32 [C], or None.
        cu_responses: int32 [C + 1] on the host; response c owns labels
            ``cu_responses[c] .. cu_responses[c + 1]``.
        cu_groups: int32 [G + 1] on the host, the same over candidates.
        cu_responses_device, cu_groups_device: copies beside input_ids.
        group_index: the positions of the groups in the list given to `pack`.
        segments: which token belongs to which prompt and response; None without shared prompts.
        sequence_lengths: tokens of every [prompt; response], one per candidate.
        longest_sequence, shortest_sequence: their extremes, as plain numbers: a compiled model
            checks them in every forward and would be bound to a whole tuple.
        names: the groups' names, for messages.
    """

    input_ids: Tensor
    position_ids: Tensor
    rows: Tensor
    labels: Tensor
    rewards: Tensor
    reference_scores: Tensor | None
    cu_responses: Tensor
    cu_groups: Tensor
    cu_responses_device: Tensor
    cu_groups_device: Tensor
    group_index: tuple[int, ...]
    segments: SegmentTable | None
    sequence_lengths: tuple[int, ...]
    longest_sequence: int
    shortest_sequence: int
    names: tuple[str | None, ...] = ()

    @property
    def num_groups(self) -> int:
        return len(self.cu_groups) - 1

    @property
    def num_candidates(self) -> int:
        return len(self.cu_responses) - 1

    @property
    def num_tokens(self) -> int:
        """Tokens that the model computes, padding included."""
        return self.input_ids.numel()

    @property
    def num_response_tokens(self) -> int:
        """T, of ranked tokens."""
        return self.labels.numel()

    @property
    def shared_prompts(self) -> bool:
        return self.segments is not None

    @property
    def device(self) -> torch.device:
        return self.input_ids.device

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> Pack:
        """The pack with its tensors on ``device``; the host offsets and segments stay there.

        With ``non_blocking`` the host does not wait for the copies to a device, whether the pack is
        pinned or not.
        """
        on_host = ("cu_responses", "cu_groups")
        place = torch.empty(0, device=device).device  # with its index
        moved: dict[str, Any] = {
            name: send(value, place) if non_blocking else value.to(place)
            for name in self.field_names
            if name not in on_host and isinstance(value := getattr(self, name), Tensor)
        }
        return self.replace(**moved)

    def pin_memory(self) -> Pack:
        """The pack in page-locked memory, for copies that overlap with computation."""
        pinned: dict[str, Any] = {
            name: value.pin_memory()
            for name in self.field_names
            if isinstance(value := getattr(self, name), Tensor)
        }
        return self.replace(**pinned)


def pack(
    groups: Sequence[Group],
    *,
    max_tokens: int,
    shared_prompts: bool | Literal["auto"] = True,
    vocab_size: int | None = None,
) -> list[Pack]:
    """Fill packs of at most ``max_tokens`` tokens with whole groups, best fit by tokens.

    ``max_tokens`` counts what the model computes: with shared prompts P + sum of R_i per group,
    otherwise the padded rows, candidates x longest [prompt; response] of the pack. Packs come in
    the order in which they were opened, the largest group first; ``Pack.group_index`` leads back to
    the given order. The result depends on nothing but the arguments.

    Args:
        groups: at least one; none gives no pack.
        max_tokens: the budget of a pack, in tokens.
        shared_prompts: encode every prompt once (one row per pack), or once per response (padded
            rows); ``"auto"`` decides for all groups by `sharing_pays`.
        vocab_size: if given, every token id must lie below it.

    Raises:
        TypeError: something else than groups, or ``max_tokens`` is no integer.
        ValueError: a group larger than the budget or a token outside the vocabulary, by its name;
            reference scores in some groups and not in others.
    """
    check_count("max_tokens", max_tokens)
    groups = check_groups(groups)
    if shared_prompts == "auto":
        fits = all(group.num_candidates * group.longest_sequence <= max_tokens for group in groups)
        shared_prompts = not fits or sharing_pays(groups)[0]
    for index, group in enumerate(groups):
        _check_group(group, index, max_tokens, shared_prompts, vocab_size)
    referenced = sum(group.reference_scores is not None for group in groups)
    if referenced not in (0, len(groups)):
        raise ValueError(
            f"reference_scores must be given for every group or for none, got {referenced} of "
            f"{len(groups)} groups"
        )
    if not groups:
        return []
    if shared_prompts:
        members = best_fit([group.num_tokens_shared for group in groups], max_tokens)
    else:
        shapes = [(group.num_candidates, group.longest_sequence) for group in groups]
        members = fill_padded(shapes, max_tokens)
    layout = shared_pack if shared_prompts else _padded_pack
    return [layout([groups[i] for i in chosen], tuple(chosen)) for chosen in members]


def sharing_pays(groups: Sequence[Group]) -> tuple[bool, str]:
    """Whether sharing prompts saves time on these groups, and the reason in words.

    Sharing saves tokens (each prompt's copies, and padding) and costs a second attention part and
    smaller products. On two CPU cores the two break even where padded rows hold 4 to 8 % more
    tokens than the shared row (prompts of 16 tokens before 4 responses of 256).
    """
    shared = sum(group.num_tokens_shared for group in groups)
    padded = sum(group.num_candidates * group.longest_sequence for group in groups)
    ratio = padded / max(1, shared)
    pays = ratio >= SHARING_PAYS_FROM
    comparison = "at least" if pays else "less than"
    return pays, (
        f"padded rows hold {ratio:.2f} times the tokens of shared ones, {comparison} the "
        f"{SHARING_PAYS_FROM} from which sharing pays"
    )


def shared_pack(groups: Sequence[Group], group_index: tuple[int, ...]) -> Pack:
    """All groups in one pack with shared prompts, in the given order."""
    segments = SegmentTable.from_lengths(
        [(len(g.prompt_ids), [len(ids) for ids in g.response_ids]) for g in groups]
    )
    rows = []
    for span in segments.groups:
        for response in span.responses:
            # The prompt's last row predicts the first token of each of its responses.
            rows.append(torch.tensor([span.prompt.stop - 1]))
            rows.append(torch.arange(response.start, response.stop - 1))
    pieces = [ids for group in groups for ids in (group.prompt_ids, *group.response_ids)]
    return _assemble(
        groups,
        group_index,
        input_ids=torch.cat(pieces)[None],
        position_ids=segments.position_ids[None],
        rows=torch.cat(rows),
        segments=segments,
    )


def _padded_pack(groups: list[Group], group_index: tuple[int, ...]) -> Pack:
    length = max(group.longest_sequence for group in groups)
    num_rows = sum(group.num_candidates for group in groups)
    input_ids = torch.full((num_rows, length), PAD_TOKEN)
    rows = []
    row = 0
    for group in groups:
        prompt_length = len(group.prompt_ids)
        for ids in group.response_ids:
            sequence_length = prompt_length + len(ids)
            input_ids[row, :prompt_length] = group.prompt_ids
            input_ids[row, prompt_length:sequence_length] = ids
            first = row * length + prompt_length - 1
            rows.append(torch.arange(first, first + len(ids)))
            row += 1
    return _assemble(
        groups,
        group_index,
        input_ids=input_ids,
        position_ids=torch.arange(length).expand(num_rows, length).contiguous(),
        rows=torch.cat(rows),
        segments=None,
    )


def _assemble(
    groups: Sequence[Group],
    group_index: tuple[int, ...],
    *,
    input_ids: Tensor,
    position_ids: Tensor,
    rows: Tensor,
    segments: SegmentTable | None,
) -> Pack:
    responses = [ids for group in groups for ids in group.response_ids]
    references = [g.reference_scores for g in groups if g.reference_scores is not None]
    labels = torch.cat(responses)
    if any(group.ranked is not None for group in groups):
        masks = (g.ranked or [ids >= 0 for ids in g.response_ids] for g in groups)
        ranked = torch.cat([mask for own in masks for mask in own])
        rows, labels = rows[ranked], labels[ranked]
    cu_responses = offsets([number for group in groups for number in group.label_counts])
    cu_groups = offsets([group.num_candidates for group in groups])
    sequence_lengths = tuple(
        len(group.prompt_ids) + len(ids) for group in groups for ids in group.response_ids
    )
    return Pack(
        input_ids=input_ids,
        position_ids=position_ids,
        rows=rows,
        labels=labels,
        rewards=torch.cat([group.rewards for group in groups]),
        reference_scores=torch.cat(references) if references else None,
        cu_responses=cu_responses,
        cu_groups=cu_groups,
        cu_responses_device=cu_responses,
        cu_groups_device=cu_groups,
        group_index=group_index,
        segments=segments,
        sequence_lengths=sequence_lengths,
        longest_sequence=max(sequence_lengths),
        shortest_sequence=min(sequence_lengths),
        names=tuple(group.name for group in groups),
    )


def offsets(lengths: Sequence[int]) -> Tensor:
    """Offsets of parts of these lengths: int32 [number of parts + 1]."""
    return torch.from_numpy(np.concatenate(([0], np.cumsum(lengths))).astype(np.int32))


def _check_group(
    group: Group, index: int, max_tokens: int, shared_prompts: bool, vocab_size: int | None
) -> None:
    where = group.name or f"group {index}"
    size = (
        group.num_tokens_shared if shared_prompts else group.num_candidates * group.longest_sequence
    )
    if size > max_tokens:
        counted = "tokens" if shared_prompts else "padded tokens"
        raise ValueError(
            f"{where}: must fit into max_tokens={max_tokens}, got {size} {counted} "
            f"({group.num_candidates} responses, prompt of {len(group.prompt_ids)})"
        )
    if vocab_size is not None:
        largest = max(int(ids.max()) for ids in (group.prompt_ids, *group.response_ids))
        if largest >= vocab_size:
            raise ValueError(
                f"{where}: token ids must lie below vocab_size={vocab_size}, got {largest}"
            )
