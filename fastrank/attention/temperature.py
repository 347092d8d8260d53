"""Llama 4's attention temperature, which counts packed indices.

Its layers without RoPE scale queries by the index of the token in the row, beyond ``floor_scale``
tokens. In a pack that is not the token's position, so the factor is exchanged for the right one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastrank.attention.segments import SegmentTable


def correct_temperature(module: nn.Module, query: Tensor, segments: SegmentTable) -> Tensor:
    """The query [1, H, N, D] as the module would have made it on a row of its own."""
    layer: Any = module
    if not getattr(layer, "attn_temperature_tuning", False) or getattr(layer, "use_rope", True):
        return query
    if segments.num_tokens < layer.floor_scale:
        return query  # every factor is 1

    def factor(position: Tensor) -> Tensor:
        steps = torch.floor((position.float() + 1.0) / layer.floor_scale)
        return torch.log1p(steps) * layer.attn_scale + 1.0

    index = torch.arange(segments.num_tokens, device=query.device)
    positions = segments.position_ids.to(query.device)
    exchange = factor(positions).double() / factor(index).double()
    return query * exchange.to(query.dtype)[:, None]
