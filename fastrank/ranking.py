"""The ranking loss of scores or token log-probabilities that exist already: the unfused way in.

Gradients by the scores are closed forms, made together with the value; nothing of size n² is
kept for the backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastrank_kernels
from fastrank_kernels import Backend, RankResult

from .arguments import Reduction, check_choice, check_tensor
from .function_loss import as_loss, own_ranking, own_terms
from .loss import Loss
from .outputs import RankingOutput


def ranking_loss(
    scores: Tensor,
    rewards: Tensor,
    *,
    loss: Loss | Callable[..., Any],
    cu_groups: Tensor | None = None,
    where: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """The ranking term ℓ of groups of candidates, without the supervised term, which needs tokens.

    Args:
        scores: [C] with ``cu_groups`` (without: one group), or [G, n]. Any float dtype; computed in
            float32, or in float64 for float64 scores.
        rewards: of the same shape; higher is better. Compared in the dtype of the computation.
        loss: e.g. ``fastrank.RRHF()``, or a function, see `fastrank.FunctionLoss`; its
            ``sft_weight`` plays no part here. For a loss that uses
            a reference (DPO, IPO, ...) subtract the reference model's scores first.
        cu_groups: int32 [G + 1], group g being ``scores[cu_groups[g]:cu_groups[g + 1]]``. On the
            host; a CUDA tensor is taken as it is, unchecked.
        where: bool [G, n], False for places that hold no candidate (only with [G, n]).
        reduction: ``"mean"`` over groups, ``"sum"``, or ``"none"`` for [G].

    Returns:
        A scalar, or [G]; differentiable in ``scores`` once. The mean over no group at all is 0.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or value.

    >>> s = torch.tensor([[1.0, 2.0, 7.0], [3.0, 1.0, 2.0]])
    >>> r = torch.tensor([[1.0, 0.0, 9.0], [0.0, 1.0, 2.0]])
    >>> keep = torch.tensor([[True, True, False], [True, True, True]])
    >>> from fastrank import RRHF
    >>> ranking_loss(s, r, loss=RRHF(), where=keep, reduction="none")
    tensor([1., 3.])
    """
    loss = as_loss(loss)
    check_choice("reduction", reduction, Reduction)
    if not isinstance(scores, Tensor) or scores.dim() not in (1, 2):
        got = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"scores must be a tensor of shape [C] or [G, n], got {got}")
    shape = tuple(scores.shape)
    check_tensor("scores", scores, shape)
    check_tensor("rewards", rewards, shape, device=scores.device)
    if scores.dim() == 2:
        if cu_groups is not None:
            raise ValueError("cu_groups goes with scores of shape [C], got scores [G, n] as well")
        if where is not None:
            check_tensor("where", where, shape, kind="bool", device=scores.device)
    elif where is not None:
        raise ValueError("where goes with scores of shape [G, n], got scores [C]")
    elif cu_groups is None:
        cu_groups = torch.tensor([0, shape[0]], dtype=torch.int32)
    else:
        check_tensor("cu_groups", cu_groups, ("G + 1",), kind="offsets")
    if loss.own_term is not None:
        if cu_groups is None:  # [G, n]
            cu_groups = torch.arange(shape[0] + 1, dtype=torch.int32) * shape[1]
            where = None if where is None else where.reshape(-1)
            scores, rewards = scores.reshape(-1), rewards.reshape(-1)
        own = own_terms(loss, scores, rewards, cu_groups=cu_groups, valid=where)
        return reduce_groups(own, reduction)
    return fastrank_kernels.rank_scores(
        scores, rewards, cu_groups=cu_groups, valid=where, spec=loss.spec(), reduction=reduction
    )


def ranking_from_logprobs(
    token_logprobs: Tensor,
    rewards: Tensor,
    *,
    cu_responses: Tensor,
    cu_groups: Tensor,
    loss: Loss,
    reference_scores: Tensor | None = None,
    reduction: Reduction = "mean",
    validate: bool = False,
    backend: Backend | None = None,
) -> RankingOutput:
    """What `fastrank.linear_ranking_loss` computes, from token log-probabilities [T] that exist
    already; differentiable in them. Arguments as there."""
    if loss.own_term is not None:
        own = own_ranking(
            loss,
            token_logprobs,
            rewards,
            cu_responses=cu_responses,
            cu_groups=cu_groups,
            reference_scores=reference_scores,
        )
        return RankingOutput(
            loss=reduce_groups(own.rank_loss + own.sft_loss, reduction),
            rank_loss=reduce_groups(own.rank_loss.detach(), reduction),
            sft_loss=reduce_groups(own.sft_loss.detach(), reduction),
            scores=own.scores.detach(),
            token_logprobs=token_logprobs.detach(),
        )
    per_group, result = fastrank_kernels.token_ranking(
        token_logprobs,
        rewards,
        cu_responses=cu_responses,
        cu_groups=cu_groups,
        spec=loss.spec(),
        reference_scores=reference_scores,
        validate=validate,
        backend=backend,
    )
    return RankingOutput(
        loss=reduce_groups(per_group, reduction),
        rank_loss=reduce_groups(result.rank_loss, reduction),
        sft_loss=reduce_groups(result.sft_loss, reduction),
        scores=result.scores,
        token_logprobs=token_logprobs.detach(),
    )


def reduce_groups(values: Tensor, reduction: Reduction) -> Tensor:
    """[G] by ``reduction``; the mean over no group is 0."""
    if reduction == "none":
        return values
    return values.sum() if reduction == "sum" else values.sum() / torch.sym_max(values.shape[0], 1)


def rank_coefficients(
    loss: Loss,
    token_logprobs: Tensor,
    rewards: Tensor,
    *,
    cu_responses: Tensor,
    cu_groups: Tensor,
    reference_scores: Tensor | None,
    scale: float = 1.0,
    backend: str | None = None,
) -> RankResult:
    """Both terms [G] of the groups, the scores [C], and the derivative of ``scale`` times the sum
    of the terms by each log-probability [T]; nothing carries gradients. The reference's scores are
    left aside by a loss that does not use them."""
    if not loss.uses_reference:
        reference_scores = None
    groups: dict[str, Any] = {
        "cu_responses": cu_responses,
        "cu_groups": cu_groups,
        "reference_scores": reference_scores,
    }
    if loss.own_term is None:
        return fastrank_kernels.rank_tokens(
            token_logprobs, rewards, **groups, spec=loss.spec(), scale=scale, backend=backend
        )
    with torch.enable_grad():
        leaf = token_logprobs.detach().requires_grad_()
        own = own_ranking(loss, leaf, rewards, **groups)
        total = (own.rank_loss + own.sft_loss).sum() * scale
        (coefficients,) = torch.autograd.grad(total, leaf)
    return RankResult(
        own.rank_loss.detach(), own.sft_loss.detach(), own.scores.detach(), coefficients
    )
