"""Autograd over the operators: gradients that the forward made are scaled by what comes from above.

What needs a gradient is passed in as flags, because ``ctx.needs_input_grad`` is True under
``no_grad`` as well and evaluation would pay for gradients. Upstream factors are applied out of
place, so a second backward over a retained graph gives the same result.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import ops
from .reference import group_scale, segment_index
from .spec import RankSpec


def wants_grad(tensor: Tensor | None) -> bool:
    """Whether a backward will ask for this tensor's gradient."""
    return tensor is not None and torch.is_grad_enabled() and tensor.requires_grad


def rank_scores(
    scores: Tensor,
    rewards: Tensor,
    cu_groups: Tensor,
    valid: Tensor | None,
    spec: RankSpec,
    backend: str = "",
    width: int | None = None,
) -> Tensor:
    """Ranking term of each group, [G], differentiable in ``scores`` [C].

    ``cu_groups`` int32 [G + 1]; ``valid`` bool [C] leaves candidates out; ``backend`` is
    ``"torch"``, ``"triton"`` or empty for the device's own. ``width`` is the size of the groups if
    they are known to be of one size, which makes the backward cheaper.
    """
    return _RankScores.apply(scores, rewards, cu_groups, valid, spec, backend, width)


class _RankScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        scores: Tensor,
        rewards: Tensor,
        cu_groups: Tensor,
        valid: Tensor | None,
        spec: RankSpec,
        backend: str,
        width: int | None,
    ) -> Tensor:
        loss, grads = ops.rank_scores(scores, rewards, cu_groups, valid, *spec, backend)
        ctx.save_for_backward(grads, cu_groups)
        ctx.dtype, ctx.width = scores.dtype, width
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads, cu_groups = ctx.saved_tensors
        if ctx.width is not None:
            scaled = (grads.view(grad.shape[0], ctx.width) * grad[:, None]).view(-1)
        else:
            offsets = cu_groups.to(grad.device, non_blocking=True)
            scaled = grads * grad[segment_index(offsets, grads.shape[0])]
        return scaled.to(ctx.dtype), *(None,) * 6


def linear_ranking(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    rewards: Tensor,
    cu_responses: Tensor,
    cu_groups: Tensor,
    spec: RankSpec,
    *,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    reference_scores: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    compute_dtype: torch.dtype | None = None,
    scale: float | None = 1.0,
    drop_dead_rows: bool = True,
    logits_memory: int = 0,
    validate: bool = False,
    backend: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(loss, rank_loss [G], sft_loss [G], scores [C], token_logprobs [T])``.

    ``loss`` is the scalar ``scale · Σ_g (rank_loss + sft_loss)_g`` (``scale=None``: the mean over
    groups), differentiable in ``hidden``, ``weight`` and ``bias``; the rest is detached. Shapes as
    in `linear.Inputs` and `linear.Ranking`; ``compute_dtype`` (default: hidden's) is what the
    products are made in.
    """
    return _LinearRanking.apply(
        hidden, weight, bias, labels, rewards, cu_responses, cu_groups, rows, reference_scores,
        logit_scale, softcap, compute_dtype or hidden.dtype, spec, scale,
        (wants_grad(hidden), wants_grad(weight), wants_grad(bias)),
        drop_dead_rows, logits_memory, validate, backend,
    )  # fmt: skip


class _LinearRanking(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        rewards: Tensor,
        cu_responses: Tensor,
        cu_groups: Tensor,
        rows: Tensor | None,
        reference_scores: Tensor | None,
        logit_scale: float,
        softcap: float | None,
        compute_dtype: torch.dtype,
        spec: RankSpec,
        scale: float | None,
        needs: tuple[bool, bool, bool],
        drop_dead_rows: bool,
        logits_memory: int,
        validate: bool,
        backend: str,
    ) -> tuple[Tensor, ...]:
        rank_loss, sft_loss, scores, logp, *grads = ops.linear_ranking(
            hidden, weight, labels, rewards, cu_responses, cu_groups, rows, bias,
            reference_scores, logit_scale, softcap, compute_dtype, *spec, scale, *needs,
            drop_dead_rows, logits_memory, validate, backend,
        )  # fmt: skip
        loss = (rank_loss + sft_loss).sum() * group_scale(scale, cu_groups)
        ctx.save_for_backward(*grads)
        ctx.needs = needs
        bias_dtype = hidden.dtype if bias is None else bias.dtype
        ctx.dtypes = (hidden.dtype, weight.dtype, bias_dtype)
        ctx.mark_non_differentiable(rank_loss, sft_loss, scores, logp)
        ctx.set_materialize_grads(False)
        return loss, rank_loss, sft_loss, scores, logp

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        grads: list[Tensor | None] = [None, None, None]
        if grad_loss is not None:
            for i, saved in enumerate(ctx.saved_tensors):
                if ctx.needs[i]:
                    # The factor is a 0-d tensor: the product keeps saved's dtype and the host
                    # does not wait.
                    grads[i] = (saved * grad_loss).to(ctx.dtypes[i])
        return (*grads, *(None,) * 16)


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    compute_dtype: torch.dtype | None = None,
    logits_memory: int = 0,
    validate: bool = False,
    backend: str = "",
) -> Tensor:
    """Log-probability of every label, [T] in float32 (float64 for float64), differentiable in
    ``hidden``, ``weight`` and ``bias`` for any downstream loss."""
    return _LinearLogprobs.apply(
        hidden, weight, bias, labels, rows, logit_scale, softcap, compute_dtype or hidden.dtype,
        (wants_grad(hidden), wants_grad(weight), wants_grad(bias)),
        logits_memory, validate, backend,
    )  # fmt: skip


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        rows: Tensor | None,
        logit_scale: float,
        softcap: float | None,
        compute_dtype: torch.dtype,
        needs: tuple[bool, bool, bool],
        logits_memory: int,
        validate: bool,
        backend: str,
    ) -> Tensor:
        logp, lse, saved = ops.linear_logprobs(
            hidden, weight, labels, rows, bias, logit_scale, softcap, compute_dtype,
            needs[0], needs[1] or needs[2], logits_memory, validate, backend,
        )  # fmt: skip
        ctx.save_for_backward(hidden, weight, bias, labels, rows, logp, lse, saved)
        ctx.head = (logit_scale, softcap, compute_dtype)
        ctx.needs, ctx.options = needs, (logits_memory, backend)
        return logp

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, rows, logp, lse, saved = ctx.saved_tensors
        made = ops.linear_logprobs_backward(
            grad, hidden, weight, labels, rows, bias, logp, lse, saved,
            *ctx.head, *ctx.needs, *ctx.options,
        )  # fmt: skip
        like = (hidden, weight, bias)
        grads = [
            grad.to(tensor.dtype) if need else None
            for grad, tensor, need in zip(made, like, ctx.needs, strict=True)
        ]
        return (*grads, *(None,) * 9)
