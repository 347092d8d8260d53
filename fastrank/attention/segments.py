"""The prompts and responses of a shared-prompt pack, as segments of its tokens.

A shared-prompt pack is one row, ``[prompt_a | a1 | a2 | ... | prompt_b | b1 | ...]``. Only
`SegmentTable` describes that row: two small integer arrays, from which every attention backend
derives what it needs (slices on the host, index arrays on a device). The alternative, a dense
[N, N] mask, is quadratic in the pack and cannot be turned back into segments.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fastrank_kernels.host_memory import send

DerivedT = TypeVar("DerivedT", bound="Tensor | tuple[Any, ...]")


class Span(NamedTuple):
    """Tokens ``start .. start + length`` of the packed row."""

    start: int
    length: int

    @property
    def stop(self) -> int:
        return self.start + self.length


@dataclass(frozen=True)
class GroupSpan:
    """One prompt and its responses, which follow it without a gap."""

    prompt: Span
    responses: tuple[Span, ...]

    @property
    def all_responses(self) -> Span:
        """The tokens of all responses, which lie side by side."""
        stop = self.responses[-1].stop if self.responses else self.prompt.stop
        return Span(self.prompt.stop, stop - self.prompt.stop)

    @cached_property
    def runs(self) -> tuple[tuple[Span, int], ...]:
        """Neighbouring responses of one length: the tokens of each such run, and its number of
        responses."""
        runs: list[tuple[Span, int]] = []
        for length, members in groupby(self.responses, key=lambda response: response.length):
            spans = list(members)
            runs.append((Span(spans[0].start, length * len(spans)), len(spans)))
        return tuple(runs)

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest [prompt; response]."""
        longest = max((response.length for response in self.responses), default=0)
        return self.prompt.length + longest


@dataclass(frozen=True, eq=False)
class SegmentTable:
    """The segments of one packed row.

    Attributes:
        offsets: int32 [S + 1] on the host; segment s holds tokens ``offsets[s] .. offsets[s + 1]``.
        parents: int32 [S] on the host; the prompt's segment for a response, s itself for a prompt.
    """

    offsets: Tensor
    parents: Tensor

    @classmethod
    def from_lengths(cls, lengths: Sequence[tuple[int, Sequence[int]]]) -> SegmentTable:
        """One ``(prompt length, response lengths)`` per group, in the order of the row."""
        sizes: list[int] = []
        parents: list[int] = []
        for prompt_length, response_lengths in lengths:
            prompt = len(sizes)
            sizes.append(prompt_length)
            sizes.extend(response_lengths)
            parents.extend([prompt] * (1 + len(response_lengths)))
        if not sizes or min(sizes) < 1:
            raise ValueError(f"segment lengths must be at least 1, got {sizes}")
        offsets = torch.zeros(len(sizes) + 1, dtype=torch.int32)
        torch.cumsum(torch.tensor(sizes), 0, out=offsets[1:])
        return cls(offsets, torch.tensor(parents, dtype=torch.int32))

    @property
    def num_tokens(self) -> int:
        return int(self.offsets[-1])

    @cached_property
    def groups(self) -> tuple[GroupSpan, ...]:
        """The segments as host integers, one entry per prompt."""
        offsets, parents = self.offsets.tolist(), self.parents.tolist()
        spans = [Span(a, b - a) for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
        grouped: list[tuple[Span, list[Span]]] = []
        for index, (span, parent) in enumerate(zip(spans, parents, strict=True)):
            if parent == index:
                grouped.append((span, []))
            else:
                grouped[-1][1].append(span)
        return tuple(GroupSpan(prompt, tuple(responses)) for prompt, responses in grouped)

    @cached_property
    def longest_sequence(self) -> int:
        """Tokens of the longest [prompt; response] of the row."""
        return max(group.longest_sequence for group in self.groups)

    @cached_property
    def longest_segment(self) -> int:
        return int((self.offsets[1:] - self.offsets[:-1]).max())

    @cached_property
    def sequence_lengths(self) -> tuple[int, ...]:
        """Tokens of every [prompt; response], in the order of the row."""
        return tuple(
            group.prompt.length + response.length
            for group in self.groups
            for response in group.responses
        )

    @cached_property
    def position_ids(self) -> Tensor:
        """int64 [N]: positions restart at the prompt's length for every response."""
        sizes = (self.offsets[1:] - self.offsets[:-1]).long()
        is_response = self.parents.long() != torch.arange(len(sizes))
        base = torch.where(is_response, sizes[self.parents.long()], torch.zeros_like(sizes))
        shift = base - self.offsets[:-1].long()
        return torch.arange(self.num_tokens) + torch.repeat_interleave(shift, sizes)

    @cached_property
    def segment_ids(self) -> Tensor:
        """int64 [N]: the segment of every token."""
        sizes = (self.offsets[1:] - self.offsets[:-1]).long()
        return torch.repeat_interleave(torch.arange(len(sizes)), sizes)

    def on_device(
        self, name: Hashable, device: torch.device, make: Callable[[SegmentTable], DerivedT]
    ) -> DerivedT:
        """The tensor or named tuple that ``make`` derives from this table, on a device.

        It is made once per name and device and kept with the table, for all layers of a forward.
        Its tensors are copied without waiting for the device.
        """

        def move(value: Any) -> Any:
            return send(value, device) if isinstance(value, Tensor) else value

        kept: dict[Any, Any] = self.__dict__.setdefault("_on_device", {})
        if (name, device) not in kept:
            made = make(self)
            moved = type(made)(*map(move, made)) if isinstance(made, tuple) else move(made)
            kept[name, device] = moved
        derived: DerivedT = kept[name, device]
        return derived
