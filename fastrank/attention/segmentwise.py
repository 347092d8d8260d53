"""Attention along every [prompt; response] sequence by itself, for any layer, dtype and device.

The keys that a segment can see are gathered (those of the prompt that its window reaches, then its
own) and attended in one call under a mask on positions. This is the specification that the other
backends are held against, and it serves the layers that they cannot: windows and chunks that are
shorter than a sequence, soft-capped logits, float64. Where nothing but a mask is needed it goes
through PyTorch's fused attention; otherwise the probabilities are formed, and kept by autograd.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fastrank.attention.segments import SegmentTable, Span
from fastrank.attention.visibility import FULL, Visibility


def segmentwise_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: SegmentTable,
    *,
    visibility: Visibility = FULL,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    fused: bool = True,
) -> Tensor:
    """Attention of every response over [its prompt; itself], as far as ``visibility`` goes.

    Args:
        query: [1, H, N, D], any float dtype.
        key, value: [1, H_kv, N, D] and [1, H_kv, N, D_v].
        segments: the layout of the N tokens.
        visibility: which earlier positions a token sees.
        scale: of the logits; 1 / sqrt(D) if None.
        softcap: logits become ``softcap * tanh(logits / softcap)``.
        sinks: [H], a logit per head that takes probability and adds no value.
        fused: allow PyTorch's fused attention where there is neither softcap nor sink.

    Returns:
        [1, N, H, D_v] in the dtype of query.
    """
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    fused = fused and softcap is None and sinks is None
    parts = []
    for group in segments.groups:
        for span in (group.prompt, *group.responses):
            prompt = group.prompt if span is not group.prompt else None
            offset = group.prompt.length if prompt else 0
            first = visibility.first(offset)
            keys, values = (_visible(tensor, prompt, span, first) for tensor in (key, value))
            rows = query.narrow(2, span.start, span.length)
            mask = _mask(span.length, keys.shape[2], offset, visibility, query.device)
            if fused:
                groups = query.shape[1] // key.shape[1]
                keys, values = (_per_query_head(tensor, groups) for tensor in (keys, values))
                part = scaled_dot_product_attention(rows, keys, values, mask, scale=scale)
            else:
                part = _explicit(rows, keys, values, mask, scale, softcap, sinks)
            parts.append(part.transpose(1, 2))
    return torch.cat(parts, dim=1)


def _visible(tensor: Tensor, prompt: Span | None, span: Span, first: int) -> Tensor:
    """The tokens at positions ``first`` and later of [prompt; span], or of the span alone."""
    own = tensor.narrow(2, span.start, span.length)
    if prompt is None or first >= prompt.length:
        return own
    shared = tensor.narrow(2, prompt.start + first, prompt.length - first)
    return torch.cat((shared, own), dim=2)


def _mask(
    num_rows: int,
    num_columns: int,
    offset: int,
    visibility: Visibility,
    device: torch.device,
) -> Tensor:
    """bool [rows, columns]; queries start at position ``offset``, keys end where queries end."""
    positions = torch.arange(offset, offset + num_rows, device=device)
    columns = torch.arange(offset + num_rows - num_columns, offset + num_rows, device=device)
    return visibility.mask(positions[:, None], columns[None, :])


def _per_query_head(tensor: Tensor, groups: int) -> Tensor:
    return tensor.repeat_interleave(groups, dim=1) if groups > 1 else tensor


def _explicit(
    rows: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """The definition: softmax over the visible logits, and the sink's if given."""
    groups = rows.shape[1] // keys.shape[1]
    keys, values = (_per_query_head(tensor, groups) for tensor in (keys, values))
    logits = torch.matmul(rows, keys.transpose(2, 3)) * scale
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~mask, -math.inf)
    if sinks is not None:
        sink = sinks.to(logits.dtype)[None, :, None, None].expand(*logits.shape[:3], 1)
        logits = torch.cat((logits, sink), dim=-1)
    probabilities = torch.softmax(logits, dim=-1)[..., : keys.shape[2]]
    return torch.matmul(probabilities.to(values.dtype), values)
