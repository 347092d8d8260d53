"""A gradient that is not finite behind values that are."""

from __future__ import annotations

from typing import Any

import torch


class InfiniteGradient(torch.autograd.Function):
    """The value as it is; an infinite gradient where ``hit``."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, hit: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(hit)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        (hit,) = ctx.saved_tensors
        return torch.where(hit, torch.full_like(grad, float("inf")), grad), None
