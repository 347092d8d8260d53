"""Shared-prompt attention by FlexAttention (CUDA): the odd masks, soft caps and sinks.

A compiled kernel evaluates the mask on (segment, parent, position) of query and key, inside the
blocks that a `BlockMask` lists. That list is built here from the segment table, a few slices a
segment, instead of by ``create_block_mask``, which evaluates the mask on all N x N pairs. The pack
is padded to whole blocks with a segment of its own, and the kernel compiled with dynamic shapes, so
that packs of changing length share it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from fastrank.attention.segments import SegmentTable, Span
from fastrank.attention.visibility import FULL, Visibility

BLOCK = 128


@functools.cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=True)


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

    Args:
        query: [1, H, N, D], any dtype that FlexAttention takes.
        key, value: [1, H_kv, N, D] and [1, H_kv, N, D_v].
        segments: the layout of the N tokens.
        visibility: which earlier positions a token sees.
        scale: of the logits; 1 / sqrt(D) if None.
        softcap: logits become ``softcap * tanh(logits / softcap)``.
        sinks: [H], a logit per head that takes probability and adds no value.
        kernel: what to call instead of the compiled ``flex_attention``.

    Returns:
        [1, N, H, D_v] in the dtype of query.
    """
    num_tokens = query.shape[2]
    missing = -num_tokens % BLOCK
    query, key, value = (
        torch.nn.functional.pad(tensor, (0, 0, 0, missing)) for tensor in (query, key, value)
    )
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


def block_mask(segments: SegmentTable, visibility: Visibility, device: torch.device) -> BlockMask:
    """The pack's `BlockMask` for one kind of layer; made once a device and kept with the table."""
    kept: dict[Any, BlockMask] = segments.__dict__.setdefault("_block_masks", {})
    if visibility.covers(segments.longest_sequence):
        visibility = FULL
    if (visibility, device) not in kept:
        partial, full = blocks(segments, visibility)
        size = partial.shape[0] * BLOCK
        kept[visibility, device] = BlockMask.from_kv_blocks(
            *_listed(partial, device),
            *_listed(full, device),
            BLOCK_SIZE=BLOCK,
            mask_mod=mask_mod(segments, visibility, device),
            seq_lengths=(size, size),
        )
    return kept[visibility, device]


def mask_mod(
    segments: SegmentTable, visibility: Visibility, device: torch.device
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The mask as FlexAttention evaluates it: on indices of the padded row."""
    missing = -segments.num_tokens % BLOCK
    count = len(segments.parents)

    def padded(values: Tensor, fill: Tensor) -> Tensor:
        return torch.cat((values, fill)).to(device, torch.int32)

    padding = torch.full((missing,), count)  # the padding is one more segment, seeing itself
    segment = padded(segments.segment_ids, padding)
    parent = padded(segments.parents.long()[segments.segment_ids], padding)
    position = padded(segments.position_ids, torch.arange(missing))

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = segment[query] == segment[key]
        prompt = parent[query] == segment[key]
        return (own | prompt) & visibility.mask(position[query], position[key])

    return visible


def blocks(segments: SegmentTable, visibility: Visibility) -> tuple[np.ndarray, np.ndarray]:
    """bool [B, B] twice: blocks of which a part may be seen, and blocks that are seen whole."""
    num_blocks = -(-segments.num_tokens // BLOCK)
    seen = np.zeros((num_blocks, num_blocks), dtype=bool)
    whole = np.zeros_like(seen)
    for group in segments.groups:
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
    tail = segments.num_tokens % BLOCK
    if tail:
        seen[-1, -1] = True  # the padding
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


def _listed(marked: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Counts int32 [1, 1, B] and indices int32 [1, 1, B, B], the marked blocks of a row first."""
    order = np.argsort(~marked, axis=1, kind="stable").astype(np.int32)
    counts = marked.sum(axis=1).astype(np.int32)
    return (
        torch.from_numpy(counts)[None, None].to(device),
        torch.from_numpy(order)[None, None].to(device),
    )


def _cap(softcap: float) -> Callable[..., Tensor]:
    def score_mod(score: Tensor, *_: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return score_mod
