"""Shared-prompt attention as parts of one softmax, merged by log-sum-exp.

A response attends to its prompt (everything) and to itself (causally). The two parts run as
separate flash attentions on views of the pack and are merged exactly:

    lse = logaddexp(lse_1, lse_2)        out = out_1 exp(lse_1 - lse) + out_2 exp(lse_2 - lse)

In the backward each part calls the unmodified flash backward with the *merged* output and
log-sum-exp, which makes its probabilities and its row term those of the whole softmax: the parts'
gradients then simply add up. An attention sink, a logit without a value, is one more part. Only the
pack's q, k, v, its output and one number per row and head are kept.

The alternative, gathering [prompt; response] keys for every response, copies each prompt n times in
every layer; windowed and soft-capped layers, which cannot be merged, take it (`varlen`,
`segmentwise`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastrank.attention.flash_parts import cpu_backward, cpu_forward, cuda_backward, cuda_forward
from fastrank.attention.segments import SegmentTable
from fastrank_kernels import first_order_only


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

    Arguments and result as in `fastrank.attention.segmentwise`; on CUDA in float16 or bfloat16,
    with heads of at most 256.
    """
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    query_key_value = same_head_size(query, key, value)
    out: Tensor = _MergedAttention.apply(*query_key_value, sinks, segments, scale)
    return out[..., : value.shape[-1]]


_HEAD_MULTIPLE = {"cpu": 1}  # of head sizes; elsewhere 8


def same_head_size(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors with heads of one size that the device's flash kernels take, padded with zeros;
    those that need no padding come back as they are."""
    size = max(tensor.shape[-1] for tensor in tensors)
    size += -size % _HEAD_MULTIPLE.get(tensors[0].device.type, 8)
    return tuple(
        tensor
        if tensor.shape[-1] == size
        else torch.nn.functional.pad(tensor, (0, size - tensor.shape[-1]))
        for tensor in tensors
    )


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
        forward = cpu_forward if query.device.type == "cpu" else cuda_forward
        out, lse = forward(query, key, value, segments, scale)
        if sinks is not None:
            merged = torch.logaddexp(lse, sinks.to(lse.dtype)[None, :, None])
            out.mul_(torch.exp(lse - merged).transpose(1, 2).unsqueeze(-1))
            lse = merged
        ctx.save_for_backward(query, key, value, sinks, out, lse)
        ctx.segments, ctx.scale = segments, scale
        return out

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, out, lse = ctx.saved_tensors
        backward = cpu_backward if query.device.type == "cpu" else cuda_backward
        grads = backward((grad, query, key, value, out, lse), ctx.segments, ctx.scale)
        grad_sinks = None
        if sinks is not None and ctx.needs_input_grad[3]:
            # The sink's value is zero: dS = p (0 - delta), delta = <grad, out>.
            delta = torch.sum(grad.to(lse.dtype) * out, dim=-1).transpose(1, 2)
            weight = torch.exp(sinks.to(lse.dtype)[None, :, None] - lse)
            grad_sinks = -torch.sum(weight * delta, dim=(0, 2)).to(sinks.dtype)
        return *grads, grad_sinks, None, None
