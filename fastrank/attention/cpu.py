"""Shared-prompt attention on a CPU: parts of one softmax, merged by log-sum-exp.

A response attends to its prompt (everything) and to itself (causally). The two parts run as
separate flash attentions on views of the pack, without copying a key, and are merged exactly:

    lse = logaddexp(lse_1, lse_2)        out = out_1 exp(lse_1 - lse) + out_2 exp(lse_2 - lse)

In the backward each part calls the unmodified flash backward with the *merged* output and
log-sum-exp, which makes its probabilities and its row term those of the whole softmax: the parts'
gradients then simply add up. An attention sink, a logit without a value, is one more part. Only the
pack's q, k, v, its output and one number a row and head are kept.

The alternative, gathering [prompt; response] keys for every response, copies each prompt n times in
every layer; windowed and soft-capped layers, which cannot be merged, take it (`segmentwise`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastrank.attention.segments import GroupSpan, SegmentTable, Span

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def merged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: SegmentTable,
    *,
    scale: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Full causal attention of every response over [its prompt; itself].

    Args:
        query: [1, H, N, D], float32, float64, bfloat16 or float16, on a CPU.
        key, value: [1, H_kv, N, D] and [1, H_kv, N, D_v]; H is a multiple of H_kv.
        segments: the layout of the N tokens.
        scale: of the logits; 1 / sqrt(D) if None.
        sinks: [H], a logit per head that takes probability and adds no value.

    Returns:
        [1, N, H, D_v] in the dtype of query.
    """
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    value_size = value.shape[-1]
    size = max(query.shape[-1], value_size)  # the flash kernel wants one head size
    query, key, value = (_widen(tensor, size) for tensor in (query, key, value))
    out: Tensor = _MergedAttention.apply(query, key, value, sinks, segments, scale)
    return out[..., :value_size]


def _widen(tensor: Tensor, size: int) -> Tensor:
    missing = size - tensor.shape[-1]
    return torch.nn.functional.pad(tensor, (0, missing)) if missing else tensor


class _MergedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        segments: SegmentTable,
        scale: float,
    ) -> Tensor:
        _, num_heads, num_tokens, head_size = query.shape
        out = query.new_empty(1, num_tokens, num_heads, head_size)
        wide = torch.promote_types(query.dtype, torch.float32)
        lse = query.new_empty(1, num_tokens, num_heads, dtype=wide).transpose(1, 2)
        heads = out.transpose(1, 2)
        for group in segments.groups:
            _forward_group(query, key, value, heads, lse, group, scale)
        if sinks is not None:
            merged = torch.logaddexp(lse, sinks.to(wide)[None, :, None])
            heads.mul_(torch.exp(lse - merged).unsqueeze(-1))
            lse = merged
        ctx.save_for_backward(query, key, value, sinks, out, lse)
        ctx.segments, ctx.scale = segments, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, out, lse = ctx.saved_tensors
        grad, heads = grad_out.transpose(1, 2), out.transpose(1, 2)
        grad_query = torch.empty_like(out).transpose(1, 2)
        grad_key, grad_value = (
            tensor.new_empty(1, tensor.shape[2], tensor.shape[1], tensor.shape[3]).transpose(1, 2)
            for tensor in (key, value)
        )
        saved = (grad, query, key, value, heads, lse)
        for group in ctx.segments.groups:
            _backward_group(saved, (grad_query, grad_key, grad_value), group, ctx.scale)
        grad_sinks = None
        if sinks is not None and ctx.needs_input_grad[3]:
            # The sink's value is zero: dS = p (0 - delta), delta = <grad, out>.
            delta = torch.sum(grad.to(lse.dtype) * heads, dim=-1)
            weight = torch.exp(sinks.to(lse.dtype)[None, :, None] - lse)
            grad_sinks = -torch.sum(weight * delta, dim=(0, 2)).to(sinks.dtype)
        return grad_query, grad_key, grad_value, grad_sinks, None, None


def _forward_group(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    group: GroupSpan,
    scale: float,
) -> None:
    """Write output and log-sum-exp of one group's tokens; all arguments are [1, H, N, ...]."""
    prompt, groups = group.prompt, query.shape[1] // key.shape[1]
    for span, count in _causal_parts(group, groups):
        part, part_lse = _attend(query, key, value, span, span, count, True, scale)
        _split(out, span, groups, count).copy_(part)
        _split(lse, span, groups, count).copy_(part_lse)
    if not group.responses:
        return
    responses = Span(prompt.stop, group.stop - prompt.stop)
    shared, shared_lse = _attend(query, key, value, responses, prompt, 1, False, scale)
    own, own_lse = (_split(tensor, responses, groups) for tensor in (out, lse))
    merged = torch.logaddexp(own_lse, shared_lse)
    own_weight = torch.exp(own_lse - merged).unsqueeze(-1)
    shared_weight = torch.exp(shared_lse - merged).unsqueeze(-1)
    if own.dtype == merged.dtype:
        own.mul_(own_weight).addcmul_(shared, shared_weight)
    else:  # both parts are weighted in float32 and rounded once
        own.copy_(own * own_weight + shared * shared_weight)
    own_lse.copy_(merged)


def _backward_group(
    saved: tuple[Tensor, ...], grads: tuple[Tensor, Tensor, Tensor], group: GroupSpan, scale: float
) -> None:
    prompt, groups = group.prompt, saved[1].shape[1] // saved[2].shape[1]
    grad_query, *grad_keys = grads
    for span, count in _causal_parts(group, groups):
        of_query, *of_keys = _attend_backward(saved, span, span, count, True, scale)
        _split(grad_query, span, groups, count).copy_(of_query)
        for grad, part in zip(grad_keys, of_keys, strict=True):
            _split(grad, span, 1, count).copy_(part)
    if not group.responses:
        return
    responses = Span(prompt.stop, group.stop - prompt.stop)
    of_query, *of_keys = _attend_backward(saved, responses, prompt, 1, False, scale)
    _split(grad_query, responses, groups).add_(of_query)
    for grad, part in zip(grad_keys, of_keys, strict=True):
        _split(grad, prompt, 1).add_(part)


def _causal_parts(group: GroupSpan, groups: int) -> list[tuple[Span, int]]:
    """Prompt and responses, which attend to themselves. Responses of one length are one batch, if
    every head has keys of its own: a batch within a batch would have to be copied."""
    own = group.runs if groups == 1 else [(response, 1) for response in group.responses]
    return [(group.prompt, 1), *own]


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Span,
    columns: Span,
    count: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Flash attention of the tokens ``rows`` over the tokens ``columns``, both ``count`` segments,
    without copies; shapes as `_split` gives them."""
    groups = query.shape[1] // key.shape[1]
    out, lse = _flash(
        _split(query, rows, groups, count).flatten(0, 1),
        _split_keys(key, columns, groups, count),
        _split_keys(value, columns, groups, count),
        0.0,
        causal,
        scale=scale,
    )
    return out.unflatten(0, (count, groups)), lse.unflatten(0, (count, groups))


def _attend_backward(
    saved: tuple[Tensor, ...], rows: Span, columns: Span, count: int, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    grad, query, key, value, out, lse = saved
    groups = query.shape[1] // key.shape[1]
    grad_query, grad_key, grad_value = _flash_backward(
        _split(grad, rows, groups, count).flatten(0, 1),
        _split(query, rows, groups, count).flatten(0, 1),
        _split_keys(key, columns, groups, count),
        _split_keys(value, columns, groups, count),
        _split(out, rows, groups, count).flatten(0, 1),
        _split(lse, rows, groups, count).flatten(0, 1),
        0.0,
        causal,
        scale=scale,
    )
    of_query, of_key, of_value = (
        part.unflatten(0, (count, groups)) for part in (grad_query, grad_key, grad_value)
    )
    if groups > 1:
        of_key, of_value = of_key.sum(1, keepdim=True), of_value.sum(1, keepdim=True)
    return of_query, of_key, of_value


def _split(tensor: Tensor, span: Span, groups: int, count: int = 1) -> Tensor:
    """The tokens of ``span`` of a [1, H, N, ...] tensor as a view [count, groups, H / groups,
    S / count, ...]: segments, and query heads that share keys, become batches."""
    tokens = tensor[0].narrow(1, span.start, span.length)
    heads = tokens.unflatten(0, (-1, groups)).unflatten(2, (count, -1))
    return heads.movedim((2, 1), (0, 1))


def _split_keys(tensor: Tensor, span: Span, groups: int, count: int) -> Tensor:
    """Keys or values for queries that `_split` gave, [count * groups, H_kv, S / count, D]: views
    with a batch stride of zero, whatever the kernel does about grouped queries."""
    return _split(tensor, span, 1, count).expand(-1, groups, -1, -1, -1).flatten(0, 1)
