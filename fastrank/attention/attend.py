"""Shared-prompt attention of one layer by the backend that serves it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastrank.attention.backends import LayerProperties, check_backend, choose_attention
from fastrank.attention.cpu import merged_attention
from fastrank.attention.segments import SegmentTable
from fastrank.attention.segmentwise import segmentwise_attention
from fastrank.attention.varlen import varlen_attention
from fastrank.attention.visibility import Visibility


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: SegmentTable,
    *,
    visibility: Visibility,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Shared-prompt attention by the backend named, or by the one that fits (``"auto"``).

    query [1, H, N, D], key [1, H_kv, N, D], value [1, H_kv, N, D_v] -> [1, N, H, D_v]. Under
    autocast all three are cast to its type, as for PyTorch's own attention: rotary embeddings leave
    queries and keys wider than values.
    """
    device_type = query.device.type
    if torch.is_autocast_enabled(device_type) and query.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    layer = LayerProperties.of(
        visibility,
        segments.longest_sequence,
        softcap=softcap is not None,
        sinks=sinks is not None,
        head_size=query.shape[-1],
        value_size=value.shape[-1],
    )
    if backend == "auto":
        backend = choose_attention(query.device, query.dtype, layer).name
    else:
        check_backend(backend, query.device, query.dtype, layer)
    if backend == "cpu":
        return merged_attention(query, key, value, segments, scale=scale, sinks=sinks)
    options: dict[str, Any] = {"visibility": visibility, "scale": scale, "softcap": softcap}
    if backend == "varlen":
        return varlen_attention(query, key, value, segments, **options)
    if backend == "flex":
        from fastrank.attention.flex import flex_attention_on_pack

        return flex_attention_on_pack(query, key, value, segments, sinks=sinks, **options)
    return segmentwise_attention(query, key, value, segments, sinks=sinks, **options)
