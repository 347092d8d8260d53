# mypy: allow-untyped-calls
"""Autograd over the operators: gradients made in the forward, scaled by the upstream gradient.

What needs a gradient is passed in as flags, because ``ctx.needs_input_grad`` is True under
``no_grad`` as well and evaluation would pay for gradients. A factor from above is applied in place,
unless the graph is retained: a second backward gives the same result.

Such gradients are numbers to autograd. A backward that is to be differentiated again
(``create_graph=True``) would take them for constants and be wrong in silence: it raises instead.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from . import ops
from .dispatch import backend_module
from .host_memory import send
from .projection import Projection
from .reference import (
    RankResult,
    accumulation_dtype,
    equal_offsets,
    group_scale,
    segment_index,
)
from .spec import RankSpec


def first_order_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A `torch.autograd.Function`'s ``backward`` that refuses to be differentiated.

    ``once_differentiable`` is not enough: it raises when something from above needs a gradient,
    which the 1 above a scalar loss never does.

    Raises:
        RuntimeError: the backward runs with ``create_graph=True``.
    """

    @wraps(backward)
    def checked(ctx: Any, *grads: Tensor | None) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "fastrank's gradients have no graph and cannot be differentiated again: expected a "
                "backward without create_graph=True"
            )
        return backward(ctx, *grads)

    return checked


def rank_scores(
    scores: Tensor,
    rewards: Tensor,
    *,
    spec: RankSpec,
    cu_groups: Tensor | None = None,
    valid: Tensor | None = None,
    reduction: str = "none",
    backend: str | None = None,
) -> Tensor:
    """Ranking term of each group, [G], or its ``"sum"`` or ``"mean"`` over the groups (0 if there
    is none), [], differentiable in ``scores``.

    ``scores`` and ``rewards`` [C] with ``cu_groups`` int32 [G + 1], or [G, n] without; ``valid``,
    bool of that shape, leaves candidates out.
    """
    loss: Tensor = _RankScores.apply(scores, rewards, cu_groups, valid, spec, reduction, backend)
    return loss


class _RankScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        scores: Tensor,
        rewards: Tensor,
        cu_groups: Tensor | None,
        valid: Tensor | None,
        spec: RankSpec,
        reduction: str,
        backend: str | None,
    ) -> Tensor:
        loss: Tensor
        if not torch.compiler.is_compiling() and type(scores) in (Tensor, torch.nn.Parameter):
            loss, grads = ops.compute_rank_scores(
                scores, rewards, cu_groups, valid, spec=spec, backend=backend
            )
        else:
            # A compiler, and tensors without numbers, know operators alone, of one shape.
            offsets = equal_offsets(scores) if cu_groups is None else cu_groups
            flat = [x if x is None else x.reshape(-1) for x in (scores, rewards, valid)]
            loss, grads = ops.rank_scores(
                flat[0], flat[1], offsets, flat[2], spec=spec.encode(), backend=backend
            )
            grads = grads.view(scores.shape)
        if reduction != "none":
            cu_groups, groups = None, loss.shape[0]
            if reduction == "mean" and groups:
                loss, grads = loss.mean(), grads.div_(groups)
            else:
                loss = loss.sum()
        ctx.dtype, ctx.reduced = scores.dtype, reduction != "none"
        ctx.save_for_backward(grads, cu_groups)
        return loss

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads, cu_groups = ctx.saved_tensors
        if ctx.reduced:
            scaled = grads * grad
        elif cu_groups is None:
            scaled = grads * grad[:, None]
        else:
            scaled = _scaled_by_segment(grads, grad, cu_groups)
        return scaled.to(ctx.dtype), *(None,) * 6


def rank_tokens(
    token_logprobs: Tensor,
    rewards: Tensor,
    *,
    cu_responses: Tensor,
    cu_groups: Tensor,
    spec: RankSpec,
    reference_scores: Tensor | None = None,
    scale: float = 1.0,
    validate: bool = False,
    backend: str | None = None,
) -> RankResult:
    """Loss and scores of whole groups, and ``coefficients`` [T]: the derivative of
    ``scale * (rank_loss + sft_loss).sum()`` by each log-probability. Not differentiable;
    `token_ranking` is.

    For callers that compute log-probabilities and gradients in passes of their own: the fused loss
    has the same step between two matrix products.

    Args:
        token_logprobs: [T], response after response; float64 stays float64 on the torch backend.
        rewards: [C]. reference_scores: [C], subtracted from the scores.
        cu_responses, cu_groups: int32 ``[C + 1]`` and ``[G + 1]``; on the host, best, where they
            are always checked.
        backend: ``"torch"``, ``"triton"``, or None for the device's own.

    Raises:
        ValueError: offsets that do not cover the tokens or candidates, an empty response, a backend
            that cannot run.
    """
    device = token_logprobs.device
    return RankResult(
        *ops.rank_tokens(
            token_logprobs=token_logprobs.detach(),
            rewards=send(rewards, device),
            cu_responses=cu_responses,
            cu_groups=cu_groups,
            reference_scores=None if reference_scores is None else send(reference_scores, device),
            spec=spec.encode(),
            scale=scale,
            validate=validate,
            backend=backend,
        )
    )


def token_ranking(
    token_logprobs: Tensor, rewards: Tensor, **options: Any
) -> tuple[Tensor, RankResult]:
    """``(loss, result)``: the loss of each group, ``rank_loss + sft_loss``, [G], differentiable in
    ``token_logprobs`` [T], and the detached `RankResult`. Arguments as for `rank_tokens`."""
    loss, *result = _TokenRanking.apply(token_logprobs, rewards, options)
    return loss, RankResult(*result)


class _TokenRanking(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, token_logprobs: Tensor, rewards: Tensor, options: dict[str, Any]
    ) -> tuple[Tensor, ...]:
        result = rank_tokens(token_logprobs, rewards, **options)
        cu_responses, cu_groups = options["cu_responses"], options["cu_groups"]
        tokens = cu_responses[cu_groups.long().to(cu_responses.device)]
        ctx.save_for_backward(result.coefficients, tokens)
        ctx.dtype = token_logprobs.dtype
        ctx.mark_non_differentiable(*result)
        ctx.set_materialize_grads(False)
        return result.rank_loss + result.sft_loss, *result

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, None, None]:
        coefficients, tokens = ctx.saved_tensors
        if grad is None:
            return None, None, None
        return _scaled_by_segment(coefficients, grad, tokens).to(ctx.dtype), None, None


def linear_ranking(
    call: Projection,
    rewards: Tensor,
    *,
    cu_responses: Tensor,
    cu_groups: Tensor,
    spec: RankSpec,
    device_offsets: tuple[Tensor, Tensor] | None = None,
    reference_scores: Tensor | None = None,
    scale: float | None = 1.0,
    drop_dead_rows: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(loss, rank_loss [G], sft_loss [G], scores [C], token_logprobs [T])``.

    ``loss`` is the scalar ``scale · Σ_g (rank_loss + sft_loss)_g`` (``scale=None``: the mean over
    groups), differentiable in the call's ``hidden``, ``weight`` and ``bias``; the rest is detached.
    Shapes as in `linear.Ranking`; ``device_offsets`` are copies of both offsets beside the hidden
    rows.
    """
    groups = {
        "rewards": rewards,
        "cu_responses": cu_responses,
        "cu_groups": cu_groups,
        "device_offsets": list(device_offsets or ()),
        "reference_scores": reference_scores,
        "spec": spec.encode(),
        "scale": scale,
        "drop_dead_rows": drop_dead_rows,
    }
    call = _with_needs(call)
    loss, *rest = _LinearRanking.apply(call.hidden, call.weight, call.bias, call, groups)
    rank_loss, sft_loss, scores, logp = rest
    return loss, rank_loss, sft_loss, scores, logp


class _LinearRanking(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        call: Projection,
        groups: dict[str, Any],
    ) -> tuple[Tensor, ...]:
        ctx.needs, ctx.dtypes = call.needs, _dtypes(call)
        *values, dh, dw, db = ops.linear_ranking(**call.cast()._asdict(), **groups)
        rank_loss, sft_loss, _, _ = values
        loss = (rank_loss + sft_loss).sum() * group_scale(groups["scale"], groups["cu_groups"])
        ctx.save_for_backward(dh, dw, db)
        ctx.mark_non_differentiable(*values)
        ctx.set_materialize_grads(False)
        return loss, *values

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 5
        made = zip(ctx.saved_tensors, ctx.needs, ctx.dtypes, strict=True)
        grads = [_scaled(saved, grad).to(d) if need else None for saved, need, d in made]
        return *grads, None, None


def linear_logprobs(call: Projection) -> Tensor:
    """Log-probability of every label, [T] in float32 (float64 for float64), differentiable in the
    call's ``hidden``, ``weight`` and ``bias`` for any downstream loss."""
    call = _with_needs(call)
    logp: Tensor = _LinearLogprobs.apply(call.hidden, call.weight, call.bias, call)
    return logp


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: Projection
    ) -> Tensor:
        logp: Tensor
        ctx.dtypes = _dtypes(call)
        call = call.cast()  # for the backward as well
        logp, norm, saved = ops.linear_logprobs(**call._asdict())
        ctx.save_for_backward(*call[:5], logp, norm, saved)  # its tensors come first
        ctx.options = call[5:]
        return logp

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, logp, norm, saved = ctx.saved_tensors
        call = Projection(*tensors, *ctx.options)
        made = ops.linear_logprobs_backward(
            **call._asdict(), grad=grad, logp=logp, norm=norm, saved=saved
        )
        grads = zip(made, call.needs, ctx.dtypes, strict=True)
        return *[g.to(dtype) if need else None for g, need, dtype in grads], None


def _with_needs(call: Projection) -> Projection:
    """The call with the gradients that a backward will ask for."""
    enabled = torch.is_grad_enabled()
    inputs = (call.hidden, call.weight, call.bias)
    return call._replace(needs=[enabled and x is not None and x.requires_grad for x in inputs])


def _dtypes(call: Projection) -> tuple[torch.dtype, ...]:
    bias = call.hidden if call.bias is None else call.bias
    return call.hidden.dtype, call.weight.dtype, bias.dtype


def _scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """A saved gradient times a factor [] that the host need not see.

    Whatever is not needed for another backward is scaled in place and handed over itself, and a
    factor of 1, which is what a loss gets that is last, costs nothing.
    """
    if torch.compiler.is_compiling():
        return gradient * factor
    if _keeps_graph():
        gradient = gradient.clone()
    module = backend_module(None, gradient.device, gradient.dtype)
    scaled: Tensor = module.rescale_(gradient, factor.to(accumulation_dtype(gradient.dtype)))
    return scaled


def _keeps_graph() -> bool:
    """Whether the backward that is running retains its graph; True if torch does not tell."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else bool(ask())


def _scaled_by_segment(values: Tensor, factors: Tensor, offsets: Tensor) -> Tensor:
    """Each segment of ``values`` times its factor."""
    offsets = send(offsets, factors.device)
    return values * factors[segment_index(offsets, values.shape[0])]
