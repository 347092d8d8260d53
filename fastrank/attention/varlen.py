"""Shared-prompt attention by a variable-length flash kernel on gathered keys (CUDA).

Each segment's queries attend to [its prompt; itself], causally and aligned at the end, which is
what the kernel's causal mask means where there are fewer queries than keys; windows come out in
positions by the same alignment. Gathering costs n copies of the prompt's keys and values in a
layer's memory; in return a layer is one kernel call, forward and backward.

Two kernels serve: PyTorch's own ``varlen_attn``, or flash-attn's where that package is installed
(the ``flash-attn`` extra), which also knows soft caps.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastrank.attention.gather import gather_keys, key_index
from fastrank.attention.segments import SegmentTable
from fastrank.attention.visibility import FULL, Visibility

MAX_HEAD_SIZE = 256


def flash_attn_installed() -> bool:
    """Whether the flash-attn package is there (it is imported only when it is used)."""
    return importlib.util.find_spec("flash_attn") is not None


@functools.cache
def torch_varlen() -> Callable[..., Any] | None:
    """PyTorch's kernel, if this version has one that takes a scale and a window."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return None
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    return varlen_attn if {"scale", "window_size"} <= known.keys() else None


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: SegmentTable,
    *,
    visibility: Visibility = FULL,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention of every response over [its prompt; itself], full or within a sliding window.

    Args:
        query: [1, H, N, D], bfloat16 or float16, D at most 256.
        key, value: [1, H_kv, N, D] and [1, H_kv, N, D_v].
        segments: the layout of the N tokens.
        visibility: which earlier positions a token sees; a chunk must cover every sequence.
        scale: of the logits; 1 / sqrt(D) if None.
        softcap: needs flash-attn.

    Returns:
        [1, N, H, D_v] in the dtype of query.
    """
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    value_size, size = value.shape[-1], max(query.shape[-1], value.shape[-1])
    rows, columns, values = (_rows(tensor, size) for tensor in (query, key, value))
    index = key_index(segments, query.device)
    columns, values = gather_keys(columns, index), gather_keys(values, index)
    left = -1
    if not visibility.covers(segments.longest_sequence):
        if visibility.kind != "sliding":
            raise ValueError(f"varlen attention cannot restrict a layer to {visibility}")
        left = visibility.size - 1
    arguments = (index.cu_queries, index.cu_keys, index.max_queries, index.max_keys)
    if flash_attn_installed():
        out = _by_flash_attn(rows, columns, values, arguments, scale, left, softcap)
    else:
        if softcap is not None:
            raise ValueError("varlen attention with a softcap needs the flash-attn package")
        out = _by_torch(rows, columns, values, arguments, scale, left)
    return out[..., :value_size][None]


def _rows(tensor: Tensor, size: int) -> Tensor:
    """[1, H, N, D] -> [N, H, size], padded with zeros; a view where nothing is missing."""
    tensor = tensor[0].transpose(0, 1)
    missing = size - tensor.shape[-1]
    return torch.nn.functional.pad(tensor, (0, missing)) if missing else tensor


def _by_flash_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    arguments: tuple[Any, ...],
    scale: float,
    left: int,
    softcap: float | None,
) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    out: Tensor = flash_attn_varlen_func(
        query,
        key,
        value,
        *arguments,
        softmax_scale=scale,
        causal=True,
        window_size=(left, 0),
        softcap=softcap or 0.0,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return out


def _by_torch(
    query: Tensor, key: Tensor, value: Tensor, arguments: tuple[Any, ...], scale: float, left: int
) -> Tensor:
    kernel = torch_varlen()
    if kernel is None:
        raise ValueError(
            "varlen attention needs flash-attn or a PyTorch whose varlen_attn takes a scale and a "
            f"window, got {torch.__version__}"
        )
    options: dict[str, Any] = {"scale": scale, "window_size": (left, 0)}
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        if "enable_gqa" in inspect.signature(kernel).parameters:
            options["enable_gqa"] = True
        else:
            key, value = (tensor.repeat_interleave(groups, 1) for tensor in (key, value))
    out: Tensor = kernel(query.contiguous(), key, value, *arguments, **options)
    return out
