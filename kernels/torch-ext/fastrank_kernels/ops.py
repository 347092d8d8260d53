"""The ``torch.library`` operators: the boundary that a compiler sees.

One operator per hot path, since each crossing costs microseconds. An operator checks the values
that shapes cannot show, plans, picks a backend and runs a driver of `linear`. All are called by
keyword, those over logits with the fields of a `Projection`; a loss is a `RankSpec`, encoded.
Gradients that nobody asked for come back as empty tensors. The operators carry no autograd formula:
the gradients are among their results, and `autograd` hands them on.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from . import dropping, linear
from .checks import check_offsets, check_range, check_rewards
from .dispatch import backend_module
from .gradients import Gradients
from .host_memory import send
from .linear import Forward, Ranking
from .planner import Plan, default_logits_memory, plan_logprobs, plan_ranking, row_pitch
from .projection import Projection
from .reference import RankResult, accumulation_dtype, group_scale, segment_index
from .spec import RankSpec


def compute_rank_scores(
    scores: Tensor,
    rewards: Tensor,
    cu_groups: Tensor | None,
    valid: Tensor | None,
    *,
    spec: RankSpec,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """What `rank_scores` computes, without an operator's boundary, which costs more than the work;
    groups of one size may also be given as in `reference.rank_scores`."""
    if cu_groups is not None and cu_groups.device.type == "cpu":
        check_offsets("cu_groups", cu_groups, scores.shape[0], "scores", allow_empty=True)
    if rewards.device.type == "cpu":
        check_rewards(rewards if valid is None else rewards[valid])
    module = backend_module(backend, scores.device, scores.dtype)
    found: tuple[Tensor, Tensor] = module.rank_scores(scores, rewards, cu_groups, valid, spec)
    return found


@torch.library.custom_op("fastrank::rank_scores", mutates_args=())
def rank_scores(
    scores: Tensor,
    rewards: Tensor,
    cu_groups: Tensor,
    valid: Tensor | None,
    *,
    spec: str,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """Ranking term [G] of each group and its gradient by the scores [C]; see
    `reference.rank_scores`."""
    return compute_rank_scores(
        scores, rewards, cu_groups, valid, spec=RankSpec.decode(spec), backend=backend
    )


@rank_scores.register_fake
def _(scores: Tensor, rewards: Tensor, cu_groups: Tensor, *_: Any, **__: Any) -> tuple[Tensor, ...]:
    return _empty(scores, cu_groups.shape[0] - 1), _empty(scores, scores.shape[0])


@torch.library.custom_op("fastrank::rank_tokens", mutates_args=())
def rank_tokens(
    token_logprobs: Tensor,
    rewards: Tensor,
    cu_responses: Tensor,
    cu_groups: Tensor,
    reference_scores: Tensor | None,
    *,
    spec: str,
    scale: float,
    validate: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fields of a `reference.RankResult`; see `reference.rank_tokens`."""
    _check_groups(token_logprobs, "token_logprobs", rewards, cu_responses, cu_groups, validate)
    module = backend_module(backend, token_logprobs.device, token_logprobs.dtype)
    found: RankResult = module.rank_tokens(
        token_logprobs, rewards, cu_responses, cu_groups, reference_scores,
        RankSpec.decode(spec), scale,
    )  # fmt: skip
    return found


@rank_tokens.register_fake
def _(
    token_logprobs: Tensor, rewards: Tensor, cu_responses: Tensor, cu_groups: Tensor, *_: Any,
    **__: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    groups, candidates, tokens = cu_groups.shape[0] - 1, rewards.shape[0], token_logprobs.shape[0]
    return tuple(_empty(token_logprobs, n) for n in (groups, groups, candidates, tokens))


@torch.library.custom_op("fastrank::segment_sum", mutates_args=())
def segment_sum(values: Tensor, offsets: Tensor, backend: str | None = None) -> Tensor:
    """Sum [segments] of each segment of ``values`` [T]; see `reference.segment_sum`."""
    if offsets.device.type == "cpu":
        check_offsets("offsets", offsets, values.shape[0], "values", allow_empty=True)
    sums: Tensor = backend_module(backend, values.device).segment_sum(values, offsets)
    return sums


@segment_sum.register_fake
def _(values: Tensor, offsets: Tensor, backend: str | None = None) -> Tensor:
    return _empty(values, offsets.shape[0] - 1)


def _segment_sum_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, offsets, _ = inputs
    ctx.save_for_backward(offsets)
    ctx.length, ctx.dtype = values.shape[0], values.dtype


def _segment_sum_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (offsets,) = ctx.saved_tensors
    index = segment_index(send(offsets, grad.device), ctx.length)
    return grad[index].to(ctx.dtype), None, None


segment_sum.register_autograd(_segment_sum_backward, setup_context=_segment_sum_context)


@torch.library.custom_op("fastrank::linear_ranking", mutates_args=())
def linear_ranking(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    rewards: Tensor,
    cu_responses: Tensor,
    cu_groups: Tensor,
    device_offsets: Sequence[Tensor],
    reference_scores: Tensor | None,
    *,
    logit_scale: float,
    softcap: float | None,
    compute_dtype: torch.dtype | None,
    head_dtype: torch.dtype | None,
    logits_memory: int | None,
    validate: bool,
    backend: str | None,
    needs: Sequence[bool],
    spec: str,
    scale: float | None,
    drop_dead_rows: bool,
    shard: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fused ranking loss: ``(rank_loss [G], sft_loss [G], scores [C], token_logprobs [T], dh,
    dW, db)``, the gradients being of ``scale · Σ_g (rank_loss + sft_loss)_g``; None is 1 / G, which
    as a number would bind a compiled graph to one number of groups.

    A gradient that was not asked for is an empty tensor; the others are in the call's
    `Projection.gradient_dtypes`.
    """
    call = Projection(
        hidden, weight, labels, rows, bias, logit_scale, softcap, compute_dtype, head_dtype,
        logits_memory, validate, backend, needs, shard,
    )  # fmt: skip
    _check_groups(labels, "labels", rewards, cu_responses, cu_groups, validate)
    _check_rows(call)
    call = call.cast()
    groups: list[int] = cu_groups.tolist()
    tokens: list[int] = cu_responses[cu_groups.long().to(cu_responses.device)].tolist()
    plan = plan_ranking(
        largest_group=max((b - a for a, b in pairwise(tokens)), default=0), **_sizes(call)
    )
    decoded = RankSpec.decode(spec)
    there = device_offsets or [send(x, hidden.device) for x in (cu_responses, cu_groups)]
    ranking = Ranking(
        rewards=rewards,
        cu_responses=there[0],
        cu_groups=there[1],
        reference_scores=reference_scores,
        spec=decoded,
        scale=group_scale(scale, cu_groups),
        drop_dead_rows=drop_dead_rows
        and decoded.leaves_rows_dead
        # Processes that share the vocabulary decide alike: not by what each has seen.
        and (shard is None or hidden.device.type == "cpu")
        and dropping.decide(hidden.device, hidden.shape[1]),
    )
    result, logp, gradients = linear.rank(call, ranking, plan, groups, tokens)
    if decoded.leaves_rows_dead and plan.strategy != "forward":
        dropping.remember(result.coefficients)
    return result.rank_loss, result.sft_loss, result.scores, logp, *_or_empty(gradients, hidden)


@linear_ranking.register_fake
def _(
    hidden: Tensor, weight: Tensor, labels: Tensor, rows: Tensor | None, bias: Tensor | None,
    rewards: Tensor, cu_responses: Tensor, cu_groups: Tensor, *_: Any, needs: Sequence[bool],
    compute_dtype: torch.dtype | None, head_dtype: torch.dtype | None, **__: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    call = Projection(
        hidden, weight, labels, bias=bias, compute_dtype=compute_dtype, head_dtype=head_dtype,
        needs=needs,
    ).cast()  # fmt: skip
    groups, candidates = cu_groups.shape[0] - 1, rewards.shape[0]
    sizes = (groups, groups, candidates, call.num_tokens)
    return (*(_empty(call.hidden, n) for n in sizes), *_fake_gradients(call))


@torch.library.custom_op("fastrank::linear_logprobs", mutates_args=())
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    *,
    logit_scale: float,
    softcap: float | None,
    compute_dtype: torch.dtype | None,
    head_dtype: torch.dtype | None,
    logits_memory: int | None,
    validate: bool,
    backend: str | None,
    needs: Sequence[bool],
    shard: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(logp [T], norm [T], saved)``, with what `linear.Forward` saves for the backward."""
    call = Projection(
        hidden, weight, labels, rows, bias, logit_scale, softcap, compute_dtype, head_dtype,
        logits_memory, validate, backend, needs, shard,
    )  # fmt: skip
    _check_rows(call)
    call = call.cast()
    done = linear.forward(call, _logprobs_plan(call))
    return done.logp, done.norm, done.saved


@linear_logprobs.register_fake
def _(
    hidden: Tensor, weight: Tensor, labels: Tensor, rows: Tensor | None, bias: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    call = Projection(hidden, weight, labels, rows, bias, **options).cast()
    stats = _empty(call.hidden, call.num_tokens)
    saved = stats.new_empty(0)
    strategy = _logprobs_plan(call).strategy
    if strategy == "keep":
        vocab = weight.shape[0]
        memory = hidden.new_empty(call.num_tokens, row_pitch(vocab), dtype=call.logits_dtype)
        saved = memory[:, :vocab]
    elif strategy == "unit":
        saved = hidden.new_empty(call.num_tokens, hidden.shape[1], dtype=call.gradient_dtype)
    return stats, torch.empty_like(stats), saved


@torch.library.custom_op("fastrank::linear_logprobs_backward", mutates_args=())
def linear_logprobs_backward(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    grad: Tensor,
    logp: Tensor,
    norm: Tensor,
    saved: Tensor,
    *,
    logit_scale: float,
    softcap: float | None,
    compute_dtype: torch.dtype | None,
    head_dtype: torch.dtype | None,
    logits_memory: int | None,
    validate: bool,
    backend: str | None,
    needs: Sequence[bool],
    shard: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(dh, dW, db)`` of ``Σ_t grad_t · logp_t``; an empty tensor where none was asked for."""
    call = Projection(
        hidden, weight, labels, rows, bias, logit_scale, softcap, compute_dtype, head_dtype,
        logits_memory, validate, backend, needs, shard,
    ).cast()  # fmt: skip
    # Finding dead rows waits for a GPU; on a CPU it is free.
    gradients = linear.backward(
        call, _logprobs_plan(call), Forward(norm, logp, saved), grad,
        drop_dead_rows=hidden.device.type == "cpu",
    )  # fmt: skip
    return _or_empty(gradients, hidden)


@linear_logprobs_backward.register_fake
def _(
    hidden: Tensor, weight: Tensor, labels: Tensor, rows: Tensor | None, bias: Tensor | None,
    *_: Any, **options: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    return _fake_gradients(Projection(hidden, weight, labels, rows, bias, **options).cast())


def _check_groups(
    tokens: Tensor,
    what: str,
    rewards: Tensor,
    cu_responses: Tensor,
    cu_groups: Tensor,
    validate: bool,
) -> None:
    if validate or (cu_responses.device.type == "cpu" and cu_groups.device.type == "cpu"):
        check_offsets("cu_responses", cu_responses, tokens.shape[0], what, allow_empty=False)
        check_offsets("cu_groups", cu_groups, rewards.shape[0], "rewards", allow_empty=True)
    if validate or rewards.device.type == "cpu":
        check_rewards(rewards)


def _check_rows(call: Projection) -> None:
    if call.validate or call.labels.device.type == "cpu":
        shard = call.vocab_shard
        vocab = call.weight.shape[0] if shard is None else shard.total
        check_range("labels", call.labels, vocab, "the vocabulary")
        if call.rows is not None:
            check_range("rows", call.rows, call.hidden.shape[0], "the hidden rows")


def _sizes(call: Projection) -> dict[str, Any]:
    """What a plan depends on."""
    device, shard = call.hidden.device, call.vocab_shard
    return {
        "rows": call.num_tokens,
        "vocab": call.weight.shape[0] if shard is None else shard.largest,
        "logits_itemsize": call.logits_dtype.itemsize,
        "hidden_grad": call.need_hidden,
        "head_grad": call.need_head,
        "budget": call.logits_memory or default_logits_memory(device.type, device.index),
        "device_type": device.type,
    }


def _logprobs_plan(call: Projection) -> Plan:
    return plan_logprobs(**_sizes(call))


def _or_empty(gradients: Gradients, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, bias = (like.new_empty(0) if g is None else g for g in gradients)
    return hidden, weight, bias


def _empty(like: Tensor, size: int) -> Tensor:
    """A fake [size] result in the dtype that ``like`` is computed in."""
    return like.new_empty(size, dtype=accumulation_dtype(like.dtype))


def _fake_gradients(call: Projection) -> tuple[Tensor, ...]:
    shapes = (call.hidden.shape, call.weight.shape, call.weight.shape[:1])
    return tuple(
        call.hidden.new_empty(shape, dtype=dtype) if need else call.hidden.new_empty(0)
        for shape, dtype, need in zip(shapes, call.gradient_dtypes, call.needs, strict=True)
    )
