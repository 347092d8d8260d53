"""The ranking loss of scores or token log-probabilities that exist already: the unfused way in.

Gradients by the scores are closed forms, made together with the value; nothing of size n² is
kept for the backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

import fastrank_kernels
from fastrank_kernels import Backend

from .arguments import Reduction, check_choice, check_tensor
from .losses import Loss
from .outputs import RankingOutput


def ranking_loss(
    scores: Tensor,
    rewards: Tensor,
    *,
    loss: Loss,
    cu_groups: Tensor | None = None,
    where: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """The ranking term ℓ of groups of candidates, without the supervised term, which needs tokens.

    Args:
        scores: [C] with ``cu_groups`` (without: one group), or [G, n]. Any float dtype; computed in
            float32, or in float64 for float64 scores.
        rewards: of the same shape; higher is better. Compared in the dtype of the computation.
        loss: e.g. ``fastrank.RRHF()``; its ``sft_weight`` plays no part here. For a loss that uses
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
    check_loss(loss)
    check_choice("reduction", reduction, Reduction)
    if not isinstance(scores, Tensor) or scores.dim() not in (1, 2):
        got = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"scores must be a tensor of shape [C] or [G, n], got {got}")
    shape = tuple(scores.shape)
    check_tensor("scores", scores, shape)
    check_tensor("rewards", rewards, shape, device=scores.device)
    valid = width = None
    if scores.dim() == 2:
        if cu_groups is not None:
            raise ValueError("cu_groups goes with scores of shape [C], got scores [G, n] as well")
        groups, width = shape
        cu_groups = torch.arange(groups + 1, dtype=torch.int32) * width
        if where is not None:
            valid = check_tensor("where", where, shape, kind="bool", device=scores.device)
            valid = valid.reshape(-1)
        scores, rewards = scores.reshape(-1), rewards.reshape(-1)
    elif where is not None:
        raise ValueError("where goes with scores of shape [G, n], got scores [C]")
    elif cu_groups is None:
        cu_groups = torch.tensor([0, shape[0]], dtype=torch.int32)
    else:
        check_tensor("cu_groups", cu_groups, ("G + 1",), kind="offsets")
    per_group = fastrank_kernels.rank_scores(
        scores, rewards, cu_groups=cu_groups, valid=valid, spec=loss.spec(), width=width
    )
    return reduce_groups(per_group, reduction)


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


def check_loss(loss: object) -> None:
    """``loss`` must be one of the library's, else TypeError."""
    if not isinstance(loss, Loss):
        raise TypeError(
            f"loss must be a fastrank loss such as fastrank.RRHF(), got {type(loss).__name__}"
        )
