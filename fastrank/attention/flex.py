"""Shared-prompt attention by FlexAttention (CUDA): the odd masks, soft caps and sinks.

A compiled kernel evaluates the mask on (segment, parent, position) of query and key, inside the
blocks that a `BlockMask` lists. That list is built here from the segment table, a few slices per
segment, instead of by ``create_block_mask``, which evaluates the mask on all N x N pairs.

Past PyTorch's limit of recompilations the kernel would silently run uncompiled and materialise all
scores. So packs look alike to the compiler: shapes are dynamic; every row is padded, with a segment
of its own (a copy has one memory order), to whole blocks, at least two (a size of one would be a
constant); full, sliding and chunked layers share one mask, "from the first visible position to the
query's own". What is left (dtype, soft cap, sinks, with gradients or without) gets a limit of its
own, and passing that is an error.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from fastrank.attention.segments import GroupSpan, SegmentTable, Span
from fastrank.attention.visibility import FULL, Visibility

BLOCK = 128
RECOMPILE_LIMIT = 64


@functools.cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)  # or it is an error


def flex_attention_on_pack(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: SegmentTable,
    *,
    visibility: Visibility = FULL,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    kernel: Callable[..., Any] | None = None,
) -> Tensor:
    """Attention of every response over [its prompt; itself], as far as ``visibility`` goes.

    Arguments and result as in `fastrank.attention.segmentwise`, in any dtype that FlexAttention
    takes. ``kernel`` is called instead of the compiled ``flex_attention``.
    """
    num_tokens = query.shape[2]
    missing = padded_size(num_tokens) - num_tokens
    query, key, value = (
        torch.nn.functional.pad(tensor, (0, 0, 0, missing)) for tensor in (query, key, value)
    )
    # The kernel takes no symbolic floats, and a model has one soft cap and one scale.
    with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT, specialize_float=True):
        result = (kernel or _compiled())(
            query,
            key,
            value,
            score_mod=_cap(softcap) if softcap is not None else None,
            block_mask=block_mask(segments, visibility, query.device),
            scale=1.0 / math.sqrt(query.shape[-1]) if scale is None else scale,
            enable_gqa=query.shape[1] != key.shape[1],
            return_lse=sinks is not None,
        )
    if sinks is not None:
        out, lse = result
        # A sink is one more term of the denominator: out exp(lse) / (exp(lse) + exp(sink)).
        share = torch.sigmoid(lse - sinks.to(lse.dtype)[None, :, None])
        out = out * share.unsqueeze(-1).to(out.dtype)
    else:
        out = result
    return out[:, :, :num_tokens].transpose(1, 2).contiguous()


def padded_size(num_tokens: int) -> int:
    """Tokens of the padded row: whole blocks, at least two, and more than the pack's."""
    return max(num_tokens // BLOCK + 1, 2) * BLOCK


class _MaskArrays(NamedTuple):
    """For each index of the padded row: its segment, its segment's parent, its position and the
    first position that it sees, int32; then the `BlockMask`'s counts and indices of the blocks seen
    in part and seen whole."""

    segment: Tensor
    parent: Tensor
    position: Tensor
    first: Tensor
    partial_counts: Tensor
    partial: Tensor
    full_counts: Tensor
    full: Tensor


def block_mask(segments: SegmentTable, visibility: Visibility, device: torch.device) -> BlockMask:
    """The pack's `BlockMask` for one kind of layer; made once per device and table."""
    if visibility.covers(segments.longest_sequence):
        visibility = FULL
    arrays = segments.on_device(
        ("flex", visibility), device, lambda table: _mask_arrays(table, visibility)
    )
    kept: dict[Any, BlockMask] = segments.__dict__.setdefault("_block_masks", {})
    if (visibility, device) not in kept:
        kept[visibility, device] = BlockMask.from_kv_blocks(
            *arrays[4:],
            BLOCK_SIZE=BLOCK,
            mask_mod=_mask_mod(*arrays[:4]),
            seq_lengths=(len(arrays.segment), len(arrays.segment)),
        )
    return kept[visibility, device]


def _mask_mod(
    segment: Tensor, parent: Tensor, position: Tensor, first: Tensor
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The mask as FlexAttention evaluates it: on indices of the padded row."""

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own_or_prompt = (segment[query] == segment[key]) | (parent[query] == segment[key])
        at = position[key]
        return own_or_prompt & (at <= position[query]) & (at >= first[query])

    return visible


def _mask_arrays(segments: SegmentTable, visibility: Visibility) -> _MaskArrays:
    # The padding is one more segment, which sees itself.
    missing = padded_size(segments.num_tokens) - segments.num_tokens
    padding = torch.full((missing,), len(segments.parents))
    position = torch.cat((segments.position_ids, torch.arange(missing)))
    partial, full = blocks(segments, visibility)
    arrays = (
        torch.cat((segments.segment_ids, padding)),
        torch.cat((segments.parents.long()[segments.segment_ids], padding)),
        position,
        visibility.first(position),
    )
    segment, parent, position, first = (array.to(torch.int32) for array in arrays)
    return _MaskArrays(segment, parent, position, first, *_listed(partial), *_listed(full))


def blocks(segments: SegmentTable, visibility: Visibility) -> tuple[np.ndarray, np.ndarray]:
    """bool [B, B] twice: blocks of which a part may be seen, and blocks that are seen whole."""
    size = padded_size(segments.num_tokens)
    num_blocks = size // BLOCK
    padding = GroupSpan(Span(segments.num_tokens, size - segments.num_tokens), ())
    seen = np.zeros((num_blocks, num_blocks), dtype=bool)
    whole = np.zeros_like(seen)
    for group in (*segments.groups, padding):
        prompt = group.prompt
        for span in (prompt, *group.responses):
            offset = 0 if span is prompt else prompt.length
            for block in range(span.start // BLOCK, (span.stop - 1) // BLOCK + 1):
                first = max(span.start, block * BLOCK)
                last = min(span.stop, (block + 1) * BLOCK) - 1
                low, high = offset + first - span.start, offset + last - span.start
                # Visible to some row of the block, and to all of them: positions from .. to.
                for keys, start in ((prompt, 0), (span, offset)):
                    _mark(seen[block], keys, start, visibility.first(low), high, touch=True)
                    if last - first == BLOCK - 1:
                        _mark(whole[block], keys, start, visibility.first(high), low, touch=False)
    return seen & ~whole, whole


def _mark(row: np.ndarray, keys: Span, offset: int, first: int, last: int, touch: bool) -> None:
    """Mark the blocks that tokens of ``keys`` at positions first .. last touch, or fill."""
    start = keys.start + max(0, first - offset)
    stop = min(keys.stop, keys.start + last - offset + 1)
    if start >= stop:
        return
    if touch:
        row[start // BLOCK : (stop - 1) // BLOCK + 1] = True
    else:
        row[-(-start // BLOCK) : stop // BLOCK] = True


def _listed(marked: np.ndarray) -> tuple[Tensor, Tensor]:
    """Counts int32 [1, 1, B] and indices int32 [1, 1, B, B], the marked blocks of a row first."""
    order = np.argsort(~marked, axis=1, kind="stable").astype(np.int32)
    counts = marked.sum(axis=1).astype(np.int32)
    return torch.from_numpy(counts)[None, None], torch.from_numpy(order)[None, None]


def _cap(softcap: float) -> Callable[..., Tensor]:
    def score_mod(score: Tensor, *_: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return score_mod
