"""What a prepared model returns without a loss."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class ScoreOutput(NamedTuple):
    """Result of ``model(pack=pack)``. Both carry gradients where gradients are enabled."""

    scores: Tensor
    """[C] mean (or sum) log-probability of each candidate, float32 (float64 for float64)."""
    token_logprobs: Tensor
    """[T] log-probability of each response token."""
