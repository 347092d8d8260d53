"""Results of the fused ranking loss and of a prepared model."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class RankingOutput(NamedTuple):
    """Result of `fastrank.linear_ranking_loss` and of a prepared model. Only ``loss`` carries
    gradients; the rest is for logging and metrics. float32 (float64 for float64 inputs)."""

    loss: Tensor
    """``rank_loss + sft_loss``: a scalar, or [G] for ``reduction="none"``."""
    rank_loss: Tensor
    """The ranking term, reduced like ``loss``."""
    sft_loss: Tensor
    """The supervised term with its weight, reduced like ``loss``."""
    scores: Tensor
    """[C] the model's own scores: mean (or sum) log-probability of each candidate."""
    token_logprobs: Tensor
    """[T] log-probability of each response token."""


class ScoreOutput(NamedTuple):
    """Result of ``model(pack=pack)``. Both carry gradients where gradients are enabled."""

    scores: Tensor
    """[C] mean (or sum) log-probability of each candidate, float32 (float64 for float64)."""
    token_logprobs: Tensor
    """[T] log-probability of each response token."""
