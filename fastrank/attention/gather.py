"""Keys of every sequence side by side: [prompt; response] for each response, gathered by index.

Variable-length kernels want each query segment's keys in one piece. Every segment's own tokens
occur once as keys and a prompt's tokens once more for each response. The backward adds a prompt's
copies up in float32, one candidate after the other on indices that do not repeat, so that the
result does not depend on the order in which a GPU's threads arrive.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastrank.attention.segments import SegmentTable


@dataclass(frozen=True, eq=False)
class KeyIndex:
    """Index arrays of one segment table on one device, for K gathered keys of N tokens.

    Attributes:
        cu_queries: int32 [S + 1], the segments' offsets.
        cu_keys: int32 [S + 1], offsets of the segments' keys among the gathered ones.
        max_queries, max_keys: the longest segment, the longest sequence.
        keys: int64 [K], the token that each gathered key is.
        own: int64 [N], where each token stands among its own segment's keys.
        shared: for candidate j = 0, 1, ... of all groups that have one: the prompt tokens
            (int64) and where their copies for that candidate stand (int64).
    """

    cu_queries: Tensor
    cu_keys: Tensor
    max_queries: int
    max_keys: int
    keys: Tensor
    own: Tensor
    shared: tuple[tuple[Tensor, Tensor], ...]


def key_index(segments: SegmentTable, device: torch.device) -> KeyIndex:
    """The table's index arrays on a device; made once for each device and kept with the table."""
    kept: dict[torch.device, KeyIndex] = segments.__dict__.setdefault("_key_index", {})
    if device not in kept:
        kept[device] = _make(segments, device)
    return kept[device]


def _make(segments: SegmentTable, device: torch.device) -> KeyIndex:
    keys: list[Tensor] = []
    own = torch.empty(segments.num_tokens, dtype=torch.long)
    copies: list[list[tuple[Tensor, Tensor]]] = []
    offsets = [0]
    for group in segments.groups:
        prompt = torch.arange(group.prompt.start, group.prompt.stop)
        for j, span in enumerate((group.prompt, *group.responses)):
            tokens = torch.arange(span.start, span.stop)
            start = offsets[-1]
            if j > 0:
                while len(copies) < j:
                    copies.append([])
                copies[j - 1].append((prompt, torch.arange(start, start + len(prompt))))
                keys.append(prompt)
                start += len(prompt)
            keys.append(tokens)
            own[tokens] = torch.arange(start, start + len(tokens))
            offsets.append(start + len(tokens))

    def move(tensor: Tensor) -> Tensor:
        return tensor.to(device, non_blocking=True)

    return KeyIndex(
        cu_queries=move(segments.offsets),
        cu_keys=move(torch.tensor(offsets, dtype=torch.int32)),
        max_queries=int((segments.offsets[1:] - segments.offsets[:-1]).max()),
        max_keys=segments.longest_sequence,
        keys=move(torch.cat(keys)),
        own=move(own),
        shared=tuple(
            (move(torch.cat([a for a, _ in pairs])), move(torch.cat([b for _, b in pairs])))
            for pairs in copies
        ),
    )


def gather_keys(tensor: Tensor, index: KeyIndex) -> Tensor:
    """[N, H, D] -> [K, H, D]: every segment's visible tokens in one piece."""
    gathered: Tensor = _GatherKeys.apply(tensor, index)
    return gathered


class _GatherKeys(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, index: KeyIndex) -> Tensor:
        ctx.index = index
        return tensor[index.keys]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        index: KeyIndex = ctx.index
        total = grad[index.own].to(torch.promote_types(grad.dtype, torch.float32))
        for tokens, copies in index.shared:
            total[tokens] += grad[copies]  # no index repeats within one candidate
        return total.to(grad.dtype), None
