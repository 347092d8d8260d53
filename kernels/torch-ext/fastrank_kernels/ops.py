"""The ``torch.library`` operators: the boundary that a compiler sees.

One operator per hot path, since each crossing costs microseconds. An operator takes a `RankSpec`
as its plain fields, checks the values that shapes cannot show, plans, picks a backend and runs a
driver of `linear`. Gradients that nobody asked for come back as empty tensors. The operators
themselves
carry no autograd formula: the gradients are among their results, and `autograd` hands them on.
"""

from __future__ import annotations

import os
from importlib import import_module
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import linear
from .checks import check_not_nan, check_offsets, check_range
from .linear import Gradients, Inputs, Ranking, logits_dtype
from .planner import Plan, default_logits_memory, plan_logprobs, plan_ranking
from .reference import RankResult, accumulation_dtype, group_scale, segment_index
from .spec import RankSpec

BACKENDS = ("torch", "triton")


def choose_backend(backend: str | None, device: torch.device) -> tuple[str, str]:
    """The backend's name and the reason for it.

    Raises:
        ValueError: an unknown name, or ``"triton"`` where it cannot run: never another one instead.
    """
    if backend == "torch":
        return "torch", "asked for"
    if backend == "triton":
        _require_triton(device)
        return "triton", "asked for"
    if backend is not None:
        raise ValueError(f"backend must be one of {BACKENDS} or None, got {backend!r}")
    if device.type == "cuda":
        try:
            import_module("triton")
        except ImportError:
            return "torch", "triton is not installed"
        return "triton", "the tensors are on a GPU"
    return "torch", f"the tensors are on {device.type}"


def _require_triton(device: torch.device) -> None:
    try:
        import_module("triton")
    except ImportError as error:
        raise ValueError(
            f"backend='triton' expected an installed triton, got {error}; pip install triton"
        ) from error
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"backend='triton' expected CUDA tensors (or TRITON_INTERPRET=1), got {device.type}"
        )


def _module(backend: str, device: torch.device) -> ModuleType:
    """The backend's module; ``backend`` is a name, or empty for the device's own choice (an
    operator takes no None for a string without a default)."""
    name, _ = choose_backend(backend or None, device)
    return import_module(".reference" if name == "torch" else ".triton_backend", __package__)


@torch.library.custom_op("fastrank::rank_scores", mutates_args=())
def rank_scores(
    scores: Tensor,
    rewards: Tensor,
    cu_groups: Tensor,
    valid: Tensor | None,
    form: str,
    phi: str,
    pairs: str,
    pair_weight: str,
    stage_scale: str,
    top_k: int,
    margin: float,
    score_scale: float,
    temperature: float,
    sft_weight: float,
    sft_growth: str,
    sft_reduction: str,
    normalize: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Ranking term [G] of each group and its gradient by the scores [C]; see
    `reference.rank_scores`."""
    spec = RankSpec(
        form, phi, pairs, pair_weight, stage_scale, top_k, margin, score_scale, temperature,
        sft_weight, sft_growth, sft_reduction, normalize,
    )  # fmt: skip
    if cu_groups.device.type == "cpu":
        check_offsets("cu_groups", cu_groups, scores.shape[0], "scores", allow_empty=True)
    if rewards.device.type == "cpu":
        check_not_nan("rewards", rewards if valid is None else rewards[valid])
    return _module(backend, scores.device).rank_scores(scores, rewards, cu_groups, valid, spec)


@rank_scores.register_fake
def _(scores: Tensor, rewards: Tensor, cu_groups: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(scores.dtype)
    return (
        scores.new_empty(cu_groups.shape[0] - 1, dtype=dtype),
        scores.new_empty(scores.shape[0], dtype=dtype),
    )


@torch.library.custom_op("fastrank::segment_sum", mutates_args=())
def segment_sum(values: Tensor, offsets: Tensor, backend: str) -> Tensor:
    """Sum [segments] of each segment of ``values`` [T]; see `reference.segment_sum`."""
    if offsets.device.type == "cpu":
        check_offsets("offsets", offsets, values.shape[0], "values", allow_empty=True)
    return _module(backend, values.device).segment_sum(values, offsets)


@segment_sum.register_fake
def _(values: Tensor, offsets: Tensor, backend: str) -> Tensor:
    return values.new_empty(offsets.shape[0] - 1, dtype=accumulation_dtype(values.dtype))


def _segment_sum_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, offsets, _ = inputs
    ctx.save_for_backward(offsets)
    ctx.length, ctx.dtype = values.shape[0], values.dtype


def _segment_sum_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (offsets,) = ctx.saved_tensors
    index = segment_index(offsets.to(grad.device, non_blocking=True), ctx.length)
    return grad[index].to(ctx.dtype), None, None


segment_sum.register_autograd(_segment_sum_backward, setup_context=_segment_sum_context)


@torch.library.custom_op("fastrank::linear_ranking", mutates_args=())
def linear_ranking(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    rewards: Tensor,
    cu_responses: Tensor,
    cu_groups: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    reference_scores: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    compute_dtype: torch.dtype,
    form: str,
    phi: str,
    pairs: str,
    pair_weight: str,
    stage_scale: str,
    top_k: int,
    margin: float,
    score_scale: float,
    temperature: float,
    sft_weight: float,
    sft_growth: str,
    sft_reduction: str,
    normalize: str,
    scale: float | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    drop_dead_rows: bool,
    logits_memory: int,
    validate: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fused ranking loss: ``(rank_loss [G], sft_loss [G], scores [C], token_logprobs [T], dh,
    dW, db)``, the gradients being of ``scale · Σ_g (rank_loss + sft_loss)_g``; None is 1 / G, which
    as a number would bind a compiled graph to one number of groups.

    ``logits_memory`` is the budget in bytes, 0 for the device's default. A gradient that was not
    asked for is an empty tensor; for float16 they are float32.
    """
    spec = RankSpec(
        form, phi, pairs, pair_weight, stage_scale, top_k, margin, score_scale, temperature,
        sft_weight, sft_growth, sft_reduction, normalize,
    )  # fmt: skip
    on_host = cu_responses.device.type == "cpu" and cu_groups.device.type == "cpu"
    if on_host or validate:
        check_offsets("cu_responses", cu_responses, labels.shape[0], "labels", allow_empty=False)
        check_offsets("cu_groups", cu_groups, rewards.shape[0], "rewards", allow_empty=True)
    if validate or rewards.device.type == "cpu":
        check_not_nan("rewards", rewards)
    inputs = _inputs(
        hidden, weight, labels, rows, bias, logit_scale, softcap, compute_dtype,
        need_hidden, need_weight, need_bias, validate, backend,
    )  # fmt: skip
    group_offsets = cu_groups.tolist()
    token_offsets = cu_responses[cu_groups.long().to(cu_responses.device)].tolist()
    plan = plan_ranking(
        rows=labels.shape[0],
        largest_group=max((b - a for a, b in pairwise(token_offsets)), default=0),
        **_plan_arguments(inputs, logits_memory),
    )
    ranking = Ranking(
        rewards=rewards,
        cu_responses=cu_responses.to(hidden.device, non_blocking=True),
        cu_groups=cu_groups.to(hidden.device, non_blocking=True),
        reference_scores=reference_scores,
        spec=spec,
        scale=group_scale(scale, cu_groups),
        drop_dead_rows=drop_dead_rows and spec.leaves_rows_dead,
    )
    result, logp, grads = _RANKING[plan.strategy](
        inputs, ranking, token_offsets, group_offsets, plan
    )
    return result.rank_loss, result.sft_loss, result.scores, logp, *_or_empty(grads, hidden)


_RANKING: dict[str, Any] = {
    "forward": lambda inputs, ranking, tokens, groups, plan: linear.rank_forward(
        inputs, ranking, plan
    ),
    "group": linear.rank_grouped,
    "recompute": lambda inputs, ranking, tokens, groups, plan: linear.rank_recomputed(
        inputs, ranking, plan
    ),
    "unit": lambda inputs, ranking, tokens, groups, plan: linear.rank_by_unit_gradient(
        inputs, ranking, plan
    ),
}


@linear_ranking.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    rewards: Tensor,
    cu_responses: Tensor,
    cu_groups: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    reference_scores: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    compute_dtype: torch.dtype,
    *rest: Any,
) -> tuple[Tensor, ...]:
    need_hidden, need_weight, need_bias = rest[-7:-4]
    dtype = accumulation_dtype(compute_dtype)
    groups = cu_groups.shape[0] - 1
    return (
        hidden.new_empty(groups, dtype=dtype),
        hidden.new_empty(groups, dtype=dtype),
        hidden.new_empty(rewards.shape[0], dtype=dtype),
        hidden.new_empty(labels.shape[0], dtype=dtype),
        *_fake_gradients(hidden, weight, compute_dtype, need_hidden, need_weight, need_bias),
    )


@torch.library.custom_op("fastrank::linear_logprobs", mutates_args=())
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    compute_dtype: torch.dtype,
    need_hidden: bool,
    need_head: bool,
    logits_memory: int,
    validate: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(logp [T], lse [T], saved)``: ``saved`` is what the planned strategy's backward needs, the
    logits (``keep``), the unit gradient (``unit``) or nothing."""
    inputs = _inputs(
        hidden, weight, labels, rows, bias, logit_scale, softcap, compute_dtype,
        need_hidden, need_head, False, validate, backend,
    )  # fmt: skip
    plan = _logprobs_plan(inputs, logits_memory)
    if plan.strategy == "keep":
        lse, logp, saved = linear.logprobs_keeping_logits(inputs)
    elif plan.strategy == "unit":
        lse, logp, saved = linear.logprobs_and_unit_gradient(inputs, plan.chunk_rows)
    else:
        lse, logp = linear.logprobs(inputs, plan.chunk_rows)
        saved = lse.new_empty(0)
    return logp, lse, saved


@linear_logprobs.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    compute_dtype: torch.dtype,
    need_hidden: bool,
    need_head: bool,
    logits_memory: int,
    validate: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(compute_dtype)
    tokens, vocab = labels.shape[0], weight.shape[0]
    logits = logits_dtype(compute_dtype, hidden.device)
    plan = plan_logprobs(
        rows=tokens,
        vocab=vocab,
        logits_itemsize=logits.itemsize,
        hidden_grad=need_hidden,
        head_grad=need_head,
        budget=logits_memory or default_logits_memory(hidden.device.type, hidden.device.index),
        device_type=hidden.device.type,
    )
    if plan.strategy == "keep":
        saved = hidden.new_empty(tokens, vocab, dtype=logits)
    elif plan.strategy == "unit":
        unit = torch.float32 if compute_dtype == torch.float16 else compute_dtype
        saved = hidden.new_empty(tokens, hidden.shape[1], dtype=unit)
    else:
        saved = hidden.new_empty(0, dtype=dtype)
    stats = hidden.new_empty(tokens, dtype=dtype)
    return stats, torch.empty_like(stats), saved


@torch.library.custom_op("fastrank::linear_logprobs_backward", mutates_args=())
def linear_logprobs_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    logp: Tensor,
    lse: Tensor,
    saved: Tensor,
    logit_scale: float,
    softcap: float | None,
    compute_dtype: torch.dtype,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    logits_memory: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(dh, dW, db)`` of ``Σ_t grad_t · logp_t``; an empty tensor where none was asked for."""
    inputs = _inputs(
        hidden, weight, labels, rows, bias, logit_scale, softcap, compute_dtype,
        need_hidden, need_weight, need_bias, False, backend,
    )  # fmt: skip
    plan = _logprobs_plan(inputs, logits_memory)
    if plan.strategy == "unit":
        grads = linear.scale_unit_gradient(inputs, saved, grad)
    else:
        grads = linear.backward(
            inputs,
            lse,
            logp,
            grad,
            saved if plan.strategy == "keep" else None,
            plan.chunk_rows,
            # Finding dead rows waits for a GPU; on a CPU it is free.
            drop_dead_rows=hidden.device.type == "cpu",
        )
    return _or_empty(grads, hidden)


@linear_logprobs_backward.register_fake
def _(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    logp: Tensor,
    lse: Tensor,
    saved: Tensor,
    logit_scale: float,
    softcap: float | None,
    compute_dtype: torch.dtype,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    logits_memory: int,
    backend: str,
) -> tuple[Tensor, ...]:
    return _fake_gradients(hidden, weight, compute_dtype, need_hidden, need_weight, need_bias)


def _inputs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    compute_dtype: torch.dtype,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    validate: bool,
    backend: str,
) -> Inputs:
    if validate or labels.device.type == "cpu":
        check_range("labels", labels, weight.shape[0], "the vocabulary")
        if rows is not None:
            check_range("rows", rows, hidden.shape[0], "the hidden rows")
    return Inputs(
        hidden=hidden.to(compute_dtype),
        weight=weight.to(compute_dtype),
        labels=labels,
        rows=rows,
        bias=bias,
        logit_scale=logit_scale,
        softcap=softcap,
        need_hidden=need_hidden,
        need_weight=need_weight,
        need_bias=need_bias,
        backend=_module(backend, hidden.device),
    )


def _plan_arguments(inputs: Inputs, logits_memory: int) -> dict[str, Any]:
    device = inputs.hidden.device
    return {
        "vocab": inputs.weight.shape[0],
        "logits_itemsize": logits_dtype(inputs.hidden.dtype, device).itemsize,
        "hidden_grad": inputs.need_hidden,
        "head_grad": inputs.need_head,
        "budget": logits_memory or default_logits_memory(device.type, device.index),
        "device_type": device.type,
    }


def _logprobs_plan(inputs: Inputs, logits_memory: int) -> Plan:
    return plan_logprobs(rows=inputs.num_tokens, **_plan_arguments(inputs, logits_memory))


def _or_empty(grads: Gradients, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, bias = (like.new_empty(0) if grad is None else grad for grad in grads)
    return hidden, weight, bias


def _fake_gradients(
    hidden: Tensor,
    weight: Tensor,
    compute_dtype: torch.dtype,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float32 if compute_dtype == torch.float16 else compute_dtype
    return (
        hidden.new_empty(hidden.shape, dtype=dtype) if need_hidden else hidden.new_empty(0),
        hidden.new_empty(weight.shape, dtype=dtype) if need_weight else hidden.new_empty(0),
        hidden.new_empty(weight.shape[0], dtype=dtype) if need_bias else hidden.new_empty(0),
    )


__all__ = [
    "BACKENDS",
    "RankResult",
    "choose_backend",
    "linear_logprobs",
    "linear_logprobs_backward",
    "linear_ranking",
    "rank_scores",
    "segment_sum",
]
