"""Shared-prompt attention as one operator, for compiled models.

Without a compiler attention works on host integers, in Python loops over segments: a compiler would
unroll them into the graph and compile anew for every pack. Here the whole attention of a layer is
opaque: the graph sees tensors whose lengths may change, among them the segment table and the mask's
answers on a few positions. So a model compiles in one piece, once for all packs.

The price: the backward runs the attention's forward once more, because the tensors that a backend
keeps for its own backward differ between backends and cannot cross the operator. That is a few
percent of a step; eager models do not pay it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastrank.attention.backends import AttentionName, attend, recording
from fastrank.attention.segments import SegmentTable
from fastrank.attention.visibility import Visibility, recognise
from fastrank_kernels import first_order_only


def opaque_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: SegmentTable,
    *,
    mask_answers: Tensor,
    local_size: int | None,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    backend: AttentionName,
) -> Tensor:
    """`fastrank.attention.backends.attend` as one operator; shapes as there.

    ``mask_answers`` is the result of `fastrank.attention.visibility.ask` for ``local_size``.
    """
    out: Tensor = _attention(
        query, key, value, sinks, segments.offsets, segments.parents, mask_answers,
        local_size, scale, softcap, backend,
    )  # fmt: skip
    return out


@torch.library.custom_op("fastrank::shared_prompt_attention", mutates_args=())
def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    offsets: Tensor,
    parents: Tensor,
    mask_answers: Tensor,
    local_size: int | None,
    scale: float | None,
    softcap: float | None,
    backend: str,
) -> Tensor:
    options = _options(offsets, parents, mask_answers, local_size, scale, softcap, backend)
    return attend(query, key, value, sinks=sinks, **options).contiguous()


@_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[-1])


@torch.library.custom_op("fastrank::shared_prompt_attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    offsets: Tensor,
    parents: Tensor,
    mask_answers: Tensor,
    local_size: int | None,
    scale: float | None,
    softcap: float | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and sinks (empty without sinks)."""
    options = _options(offsets, parents, mask_answers, local_size, scale, softcap, backend)
    given = [query, key, value] + ([] if sinks is None else [sinks])
    leaves = [tensor.detach().requires_grad_() for tensor in given]
    sink_leaf = None if sinks is None else leaves[3]
    with recording():
        out = attend(leaves[0], leaves[1], leaves[2], sinks=sink_leaf, **options)
        found = [made.contiguous() for made in torch.autograd.grad(out, leaves, grad)]
    if sinks is None:
        found.append(query.new_empty(0))
    return found[0], found[1], found[2], found[3]


@_attention_backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    given = (query, key, value, query.new_empty(0) if sinks is None else sinks)
    made = [tensor.new_empty(tensor.shape) for tensor in given]
    return made[0], made[1], made[2], made[3]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.options = inputs[7:]


@first_order_only
def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    query, key, value, sinks = _attention_backward(grad.contiguous(), *tensors, *ctx.options)
    return query, key, value, None if tensors[3] is None else sinks, *(None,) * 7


_attention.register_autograd(_backward, setup_context=_save)


def _options(
    offsets: Tensor,
    parents: Tensor,
    mask_answers: Tensor,
    local_size: int | None,
    scale: float | None,
    softcap: float | None,
    backend: str,
) -> dict[str, Any]:
    visibility = _visibility(tuple(mask_answers.tolist()), local_size)
    segments = _segments(tuple(offsets.tolist()), tuple(parents.tolist()))
    return {
        "segments": segments, "visibility": visibility, "scale": scale, "softcap": softcap,
        "backend": backend,
    }  # fmt: skip


@lru_cache(maxsize=64)
def _visibility(mask_answers: tuple[bool, ...], local_size: int | None) -> Visibility:
    return recognise(torch.tensor(mask_answers), local_size)


@lru_cache(maxsize=4)
def _segments(offsets: tuple[int, ...], parents: tuple[int, ...]) -> SegmentTable:
    """One table for all layers of a forward: it keeps the arrays derived from it."""
    table = [torch.tensor(values, dtype=torch.int32) for values in (offsets, parents)]
    return SegmentTable(table[0], table[1])
