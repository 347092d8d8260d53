"""The ranking losses as a competent user writes them in plain PyTorch.

Every peer gets its token log-probabilities in its own way and goes on from here, and the float64
values that results are held against are these formulas in float64. Nothing here uses fastrank, so a
mistake in one of the two shows as a red gate.
"""

from __future__ import annotations

import torch
from torch import Tensor


def loss_from_logprobs(logprobs: Tensor, rewards: Tensor, loss: str) -> Tensor:
    """The whole loss, mean over groups, from ``logprobs`` [G, n, R] and ``rewards`` [G, n]:
    ``"rrhf"`` with the mean of the best candidate's tokens as its supervised term, ``"pro"`` with
    ``0.05 (n - 1)²`` times their sum."""
    scores = logprobs.mean(dim=-1)
    best = rewards.argmax(dim=1)
    best_tokens = logprobs[torch.arange(len(best), device=best.device), best]
    if loss == "rrhf":
        supervised = -best_tokens.mean(dim=-1)
    else:
        supervised = -0.05 * (scores.shape[1] - 1) ** 2 * best_tokens.sum(dim=-1)
    return (ranking_term(scores, rewards, loss) + supervised).mean()


def ranking_term(scores: Tensor, rewards: Tensor, loss: str) -> Tensor:
    """[G] the ranking term of ``scores`` [G, n] under ``rewards`` [G, n]."""
    return {"rrhf": _rrhf, "pro": _pro}[loss](scores, rewards)


def _rrhf(scores: Tensor, rewards: Tensor) -> Tensor:
    """Sum over r_i < r_j of max(0, s_i - s_j)."""
    difference = scores[:, :, None] - scores[:, None, :]
    counts = rewards[:, :, None] < rewards[:, None, :]
    return (torch.relu(difference) * counts).sum(dim=(1, 2))


def _pro(scores: Tensor, rewards: Tensor) -> Tensor:
    """Sum over k of logsumexp_{i >= k}(a_ki s_i) - a_kk s_k, by falling reward; a stage without a
    strictly worse candidate is left out."""
    rewards, order = rewards.sort(dim=1, descending=True, stable=True)
    scores = scores.gather(1, order)
    total = torch.zeros_like(scores[:, 0])
    for k in range(scores.shape[1] - 1):
        gaps = rewards[:, k, None] - rewards[:, k + 1 :]
        largest = gaps.max(dim=1).values
        own = largest * scores[:, k]
        others = gaps * scores[:, k + 1 :]
        stage = torch.logsumexp(torch.cat([own[:, None], others], dim=1), dim=1) - own
        total = total + torch.where(largest > 0, stage, torch.zeros_like(stage))
    return total
