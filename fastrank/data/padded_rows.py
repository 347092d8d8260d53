"""From a padded batch, as a training script has it, to a pack.

One candidate per row, prompt and response, labels -100 outside of the response. Candidates of one
prompt become a group with a shared prompt; where their rows do not even begin alike, or the model
cannot share, they stay one row each, with the same result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastrank.arguments import check_tensor
from fastrank.data.group import Group, per_response
from fastrank.data.packing import PAD_TOKEN, Pack, offsets, shared_pack, sharing_pays

IGNORE_INDEX = -100

#: One number per candidate: a list per prompt, [G, n], or all of them flat.
PerCandidate = Tensor | Sequence[Any]


@dataclass(frozen=True, eq=False)
class PaddedRows:
    """The rows of a padded batch without their padding, on the host: C candidates.

    Attributes:
        sequences: C times int64 [S], from the first token to the last label.
        places: C times int64 [R], the places of the labels in the sequence, rising from 1 or more.
        rewards: one tensor [n] per prompt.
    """

    sequences: tuple[Tensor, ...]
    places: tuple[Tensor, ...]
    rewards: tuple[Tensor, ...]

    @property
    def sizes(self) -> list[int]:
        """Candidates of each prompt."""
        return [len(rewards) for rewards in self.rewards]

    def per_prompt(self, name: str, values: PerCandidate) -> list[Tensor]:
        """One number per candidate as one tensor [n] per prompt, in the forms that rewards have.

        Raises:
            ValueError: another number of them, or one that is not finite.
        """
        return _per_prompt(name, values, self.sizes, ordered=False)

    def pack(self, *, shared_prompts: bool) -> Pack:
        """All candidates in one pack, in the order of the rows; with shared prompts where they are
        wanted, possible and worth it."""
        groups = self._groups() if shared_prompts else None
        if groups is not None and sharing_pays(groups)[0]:
            return shared_pack(groups, tuple(range(len(groups))))
        return self._padded_pack()

    def _groups(self) -> list[Group] | None:
        """Groups with the tokens that a prompt's rows begin with as the prompt, and what follows
        them without a label as context; None if some do not begin alike."""
        groups, first = [], 0
        for rewards in self.rewards:
            rows = slice(first, first + len(rewards))
            first = rows.stop
            sequences, places = self.sequences[rows], self.places[rows]
            start = min(int(own[0]) for own in places)
            begins = torch.stack([sequence[:start] for sequence in sequences])
            start = int((begins == begins[0]).all(0).cumprod(0).sum())
            if not start:
                return None
            ranked = [torch.zeros(len(x) - start, dtype=torch.bool) for x in sequences]
            for mask, own in zip(ranked, places, strict=True):
                mask[own - start] = True
            responses = tuple(sequence[start:] for sequence in sequences)
            groups.append(Group(sequences[0][:start], responses, rewards, ranked=tuple(ranked)))
        return groups

    def _padded_pack(self) -> Pack:
        lengths = [len(sequence) for sequence in self.sequences]
        length = max(lengths)
        input_ids = torch.full((len(lengths), length), PAD_TOKEN)
        for row, sequence in enumerate(self.sequences):
            input_ids[row, : len(sequence)] = sequence
        places = [row * length + place for row, place in enumerate(self.places)]
        cu_responses = offsets([len(place) for place in places])
        cu_groups = offsets(self.sizes)
        return Pack(
            input_ids=input_ids,
            position_ids=torch.arange(length).expand(len(lengths), length).contiguous(),
            rows=torch.cat(places) - 1,
            labels=input_ids.view(-1)[torch.cat(places)],
            rewards=torch.cat(self.rewards),
            reference_scores=None,
            cu_responses=cu_responses,
            cu_groups=cu_groups,
            cu_responses_device=cu_responses,
            cu_groups_device=cu_groups,
            group_index=tuple(range(len(self.rewards))),
            segments=None,
            sequence_lengths=tuple(lengths),
            longest_sequence=length,
            shortest_sequence=min(lengths),
            names=(None,) * len(self.rewards),
        )


def read_rows(
    input_ids: Tensor,
    labels: Tensor,
    rewards: PerCandidate,
    *,
    cu_groups: Tensor | None = None,
    attention_mask: Tensor | None = None,
    vocab_size: int | None = None,
) -> PaddedRows:
    """The rows of a padded batch, checked; arguments as for `fastrank.rank`.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or value; the text names it.
    """
    check_tensor("input_ids", input_ids, ("B", "L"), kind="int64")
    shape = tuple(input_ids.shape)
    check_tensor("labels", labels, shape, kind="int64")
    if not input_ids.numel():
        raise ValueError(f"input_ids must have at least one row and one token, got {list(shape)}")
    ids, wanted = input_ids.detach().cpu(), labels.detach().cpu()
    keep = wanted != IGNORE_INDEX
    _refuse(
        keep & (wanted != ids),
        "labels must be input_ids where a response is (not shifted), else -100, got another token",
    )
    real = _real_tokens(attention_mask, shape)
    _refuse(keep & ~real, "labels must be -100 where attention_mask is 0, got a label")
    _refuse(~keep.any(1, keepdim=True), "labels must have a token in every row, got none")
    columns = torch.arange(shape[1])
    begin = real.long().argmax(1, keepdim=True)  # of the first real token
    end = torch.where(keep, columns + 1, 0).amax(1, keepdim=True)
    inside = (columns >= begin) & (columns < end)
    _refuse(inside & ~real, "attention_mask must be one run of ones per row, got a gap")
    _refuse(keep & (columns == begin), "labels must leave out the first token, which none predicts")
    _refuse(inside & (ids < 0), "input_ids must not be negative, got one")
    if vocab_size is not None:
        what = f"input_ids must be below the model's {vocab_size} tokens, got more"
        _refuse(inside & (ids >= vocab_size), what)
    sizes = _sizes(rewards, cu_groups, shape[0])
    rows = PaddedRows(
        sequences=tuple(row[mask] for row, mask in zip(ids, inside, strict=True)),
        places=tuple(
            mask.nonzero()[:, 0] - first for mask, first in zip(keep, begin[:, 0], strict=True)
        ),
        rewards=tuple(_per_prompt("rewards", rewards, sizes, ordered=True)),
    )
    if cu_groups is None and not _is_nested(rewards):
        _check_one_prompt(rows)
    return rows


def _refuse(wrong: Tensor, message: str) -> None:
    """Raise ``message`` with the first place at which a mask [B, L] or [B, 1] is set."""
    if bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        where = f"row {row}" + (f", position {column}" if wrong.shape[1] > 1 else "")
        raise ValueError(f"{message} in {where}")


def _real_tokens(attention_mask: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    if attention_mask is None:
        return torch.ones(shape, dtype=torch.bool)
    if not isinstance(attention_mask, Tensor) or tuple(attention_mask.shape) != shape:
        got = getattr(attention_mask, "shape", type(attention_mask).__name__)
        got = list(got) if isinstance(got, torch.Size) else got
        raise ValueError(
            f"attention_mask must have the shape {list(shape)} of input_ids, got {got}"
        )
    return attention_mask.detach().cpu() != 0


def _is_nested(values: PerCandidate) -> bool:
    if isinstance(values, Tensor) or hasattr(values, "ndim"):
        return values.ndim == 2
    return any(isinstance(value, Sequence) or getattr(value, "ndim", 0) for value in values)


def _sizes(rewards: PerCandidate, cu_groups: Tensor | None, num_rows: int) -> list[int]:
    """Candidates of each prompt, by the form of the rewards or by the offsets."""
    if _is_nested(rewards):
        if cu_groups is not None:
            raise ValueError("cu_groups goes with flat rewards, got rewards of each prompt too")
        sizes = [len(own) for own in rewards]
        if sum(sizes) != num_rows or 0 in sizes:
            raise ValueError(
                f"rewards must have one value for each of the {num_rows} rows of input_ids and at "
                f"least one for each prompt, got {sizes} for {len(sizes)} prompts"
            )
        return sizes
    if len(rewards) != num_rows:
        raise ValueError(
            f"rewards must have one value for each of the {num_rows} rows of input_ids, got "
            f"{len(rewards)}"
        )
    if cu_groups is None:
        return [num_rows]
    check_tensor("cu_groups", cu_groups, ("G + 1",), kind="offsets")
    bounds = cu_groups.tolist()
    found = [stop - start for start, stop in zip(bounds, bounds[1:], strict=False)]
    if bounds[:1] != [0] or bounds[-1] != num_rows or min(found, default=0) < 1:
        raise ValueError(
            f"cu_groups must rise from 0 to {num_rows} (rows of input_ids), got {bounds}"
        )
    return found


def _per_prompt(
    name: str, values: PerCandidate, sizes: Sequence[int], *, ordered: bool
) -> list[Tensor]:
    nested = _is_nested(values)
    if isinstance(values, Tensor):
        values = values.detach().cpu()  # once, and not prompt after prompt
    given = len(values)
    if given != (len(sizes) if nested else sum(sizes)):
        raise ValueError(
            f"{name} must have one value for each of {sum(sizes)} candidates, or one list for each "
            f"of {len(sizes)} prompts, got {given} {'lists' if nested else 'values'}"
        )
    made, first = [], 0
    for number, size in enumerate(sizes):
        own: Any = values[number] if nested else values[first : first + size]
        first += size
        made.append(per_response(own, size, f"{name} of prompt {number}", ordered=ordered))
    return made


def _check_one_prompt(rows: PaddedRows) -> None:
    """Flat rewards without offsets are those of one prompt: refuse rows of several."""
    first = rows.sequences[0][: int(rows.places[0][0])]
    for row, (sequence, places) in enumerate(zip(rows.sequences, rows.places, strict=True)):
        if not torch.equal(sequence[: int(places[0])], first):
            raise ValueError(
                "rewards without cu_groups are those of one prompt, got another prompt in row "
                f"{row}: give a list per prompt, or cu_groups"
            )
