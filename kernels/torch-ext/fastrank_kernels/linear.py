"""The fused drivers: vendor matrix products around the operators, a few groups of logits at a time.

Each function is one strategy of `planner`, the same for every backend; a backend is a module
with the functions of `reference`. Every driver takes `Inputs`, whose tensors are already in the
dtype they are multiplied in. Logits live in one buffer that is used again for each chunk, and
their gradient is written over them.

Memory beside the gradients themselves is one chunk of logits. Matrix products of logits size: 1 to
evaluate, 3 for ``group`` (2 with a frozen head), 3 for ``keep``, 4 for ``recompute``, 2 for
``unit``.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from . import host_memory, reference
from .gradients import HeadGrad, HiddenGrad, scatter_rows
from .planner import Plan, group_chunks
from .reference import RankResult, accumulation_dtype
from .spec import RankSpec


class Inputs(NamedTuple):
    """Hidden rows, head and labels of one call, with what is differentiated."""

    hidden: Tensor
    """[T, D], or [N, D] with ``rows``."""
    weight: Tensor
    """[V, D], in hidden's dtype."""
    labels: Tensor
    """int64 [T]."""
    rows: Tensor | None
    """int64 [T]: the hidden row that predicts each label."""
    bias: Tensor | None
    """[V]."""
    logit_scale: float
    softcap: float | None
    need_hidden: bool
    need_weight: bool
    need_bias: bool
    backend: ModuleType

    def take(self, at: slice | Tensor) -> Tensor:
        """The hidden rows that predict the labels ``at``."""
        return self.hidden[at] if self.rows is None else self.hidden[self.rows[at]]

    @property
    def num_tokens(self) -> int:
        return self.labels.shape[0]

    @property
    def need_head(self) -> bool:
        return self.need_weight or self.need_bias


class Ranking(NamedTuple):
    """Whole groups to be ranked, and the loss."""

    rewards: Tensor
    """[C]."""
    cu_responses: Tensor
    """int32 [C + 1], on the tokens' device."""
    cu_groups: Tensor
    """int32 [G + 1], on the tokens' device."""
    reference_scores: Tensor | None
    """[C]."""
    spec: RankSpec
    scale: float
    """What the sum of the groups' losses is multiplied by (1 / G for a mean)."""
    drop_dead_rows: bool
    """Whether rows with a coefficient of exactly zero are left out of the backward products."""


class Gradients(NamedTuple):
    """Gradients of one call; None where none was asked for. float32 for float16 inputs."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class Logits:
    """The one buffer in which every chunk of logits is made, and its gradient after it."""

    def __init__(self, inputs: Inputs, chunk_rows: int) -> None:
        self._inputs = inputs
        dtype = logits_dtype(inputs.hidden.dtype, inputs.hidden.device)
        shape = (chunk_rows, inputs.weight.shape[0])
        self._memory = host_memory.empty(shape, dtype, inputs.hidden.device)

    def make(self, hidden: Tensor) -> Tensor:
        """``hidden @ weightᵀ`` for a chunk, [rows, V]; overwrites the chunk before."""
        logits = self._memory[: hidden.shape[0]]
        if logits.dtype == hidden.dtype:
            return torch.mm(hidden, self._inputs.weight.t(), out=logits)
        weight = self._inputs.weight
        return torch.ops.aten.mm.dtype_out(hidden, weight.t(), logits.dtype, out=logits)

    def gradient(
        self,
        logits: Tensor,
        at: slice | Tensor,
        lse: Tensor,
        logp: Tensor,
        coefficients: Tensor,
        live: Tensor | None = None,
        *,
        keep_logits: bool = False,
    ) -> Tensor:
        """Gradient of a chunk's logits in the dtype of the products, over the logits where that can
        be; ``at`` are the labels' places, the other arguments are the chunk's own."""
        inputs = self._inputs
        compute = inputs.hidden.dtype
        rows, vocab = logits.shape
        # A kernel's programs move the rows of a compaction all at once: they need a place of
        # their own. The reference moves them one block after the other.
        separate = live is not None and inputs.backend is not reference
        if keep_logits:
            out = self._memory.view(compute)[:rows, :vocab]
        elif separate:
            assert live is not None
            out = torch.empty(live.numel(), vocab, dtype=compute, device=logits.device)
        else:
            out = logits.view(compute)[:, :vocab]
        return inputs.backend.dlogits(
            logits,
            inputs.labels[at],
            lse,
            logp,
            coefficients,
            inputs.bias,
            inputs.logit_scale,
            inputs.softcap,
            out=out,
            live=live,
        )


def logits_dtype(compute: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype that logits are made in: float32 from narrow inputs where the vendor's library can
    (CUDA), else the inputs' own."""
    narrow = compute in (torch.bfloat16, torch.float16)
    return torch.float32 if narrow and device.type == "cuda" else compute


def logprobs(inputs: Inputs, chunk_rows: int) -> tuple[Tensor, Tensor]:
    """``forward``: log-sum-exp and log-probability of every label, both [T]; one product."""
    lse, logp = _token_stats(inputs)
    logits = Logits(inputs, chunk_rows)
    for at in _row_chunks(inputs.num_tokens, chunk_rows):
        lse[at], logp[at] = _stats(inputs, logits.make(inputs.take(at)), at)
    return lse, logp


def logprobs_keeping_logits(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """``keep``: as `logprobs`, and the logits [T, V] for the backward."""
    everything = slice(0, inputs.num_tokens)
    logits = Logits(inputs, inputs.num_tokens).make(inputs.take(everything))
    lse, logp = _stats(inputs, logits, everything)
    return lse, logp, logits


def logprobs_and_unit_gradient(inputs: Inputs, chunk_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """``unit``: as `logprobs`, and U [T, D] with ``U_t = ∂logp_t / ∂h_t``; two products."""
    lse, logp = _token_stats(inputs)
    unit = HiddenGrad(inputs.num_tokens, inputs.hidden, inputs.hidden.dtype, zero=False)
    logits = Logits(inputs, chunk_rows)
    for at in _row_chunks(inputs.num_tokens, chunk_rows):
        chunk = logits.make(inputs.take(at))
        lse[at], logp[at] = _stats(inputs, chunk, at)
        dlogits = logits.gradient(chunk, at, lse[at], logp[at], torch.ones_like(logp[at]))
        unit.add(at, dlogits, inputs.weight)
    return lse, logp, unit.grad


def scale_unit_gradient(inputs: Inputs, unit: Tensor, coefficients: Tensor) -> Gradients:
    """The backward of ``unit``: each row of U times its coefficient."""
    scaled = (unit * coefficients[:, None]).to(unit.dtype)
    return Gradients(scatter_rows(scaled, inputs.rows, inputs.hidden.shape[0]), None, None)


def backward(
    inputs: Inputs,
    lse: Tensor,
    logp: Tensor,
    coefficients: Tensor,
    kept_logits: Tensor | None,
    chunk_rows: int,
    *,
    drop_dead_rows: bool,
) -> Gradients:
    """Gradients of ``Σ_t coefficients_t · logp_t``: from kept logits (``keep``), which stay as they
    are for another backward, or from logits made again (``recompute``)."""
    live = inputs.backend.live_rows(coefficients) if drop_dead_rows else None
    if live is not None and live.numel() == inputs.num_tokens:
        live = None
    lift = None
    if inputs.hidden.dtype == torch.float16:
        # A power of two, found on the device, that brings the largest coefficient near 1.
        largest = coefficients.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
        lift = torch.exp2(-torch.floor(torch.log2(largest)))
        coefficients = coefficients * lift
    count = inputs.num_tokens if live is None else live.numel()
    chunks = _row_chunks(count, chunk_rows)
    hidden_grad, head_grad = _make_grads(inputs, zero=live is not None, chunks=len(chunks))
    logits = Logits(inputs, max(1, min(chunk_rows, count)))
    for chunk in chunks:
        at = chunk if live is None else live[chunk]
        hidden = inputs.take(at)
        source = logits.make(hidden) if kept_logits is None else kept_logits[at]
        dlogits = logits.gradient(
            source, at, lse[at], logp[at], coefficients[at], keep_logits=kept_logits is not None
        )
        _accumulate(inputs, hidden_grad, head_grad, at, dlogits, hidden)
    return _finish(inputs, hidden_grad, head_grad, lift)


def rank_grouped(
    inputs: Inputs, ranking: Ranking, token_offsets: list[int], group_offsets: list[int], plan: Plan
) -> tuple[RankResult, Tensor, Gradients]:
    """``group``: logits of whole groups → statistics → rank → gradient over the logits → dh, dW.

    ``token_offsets`` [G + 1] and ``group_offsets`` [G + 1] are host copies of where each group's
    tokens and candidates begin. Returns the rank result, the token log-probabilities and the
    gradients of ``scale · Σ_g loss_g``.
    """
    chunks = group_chunks(token_offsets, plan.chunk_rows)
    lse, logp = _token_stats(inputs)
    hidden_grad, head_grad = _make_grads(inputs, zero=ranking.drop_dead_rows, chunks=len(chunks))
    lift = None
    if inputs.hidden.dtype == torch.float16:
        # Coefficients are of the order of scale / |y|, below what float16 holds once they meet a
        # probability: a power of two brings them near 1 without waiting for their values.
        tokens_a_candidate = inputs.num_tokens / max(1, ranking.rewards.numel())
        lift = 2.0 ** round(math.log2(max(1.0, tokens_a_candidate) / ranking.scale))
        ranking = ranking._replace(scale=ranking.scale * lift)
    largest = max((token_offsets[b] - token_offsets[a] for a, b in chunks), default=0)
    logits = Logits(inputs, largest)
    results = []
    for first, last in chunks:
        at = slice(token_offsets[first], token_offsets[last])
        hidden = inputs.take(at)
        chunk = logits.make(hidden)
        lse[at], logp[at] = _stats(inputs, chunk, at)
        result = _rank(inputs, ranking, logp[at], (first, last), group_offsets, token_offsets)
        results.append(result)
        live = _live_or_none(inputs, ranking, result.coefficients)
        if live is None:
            dlogits = logits.gradient(chunk, at, lse[at], logp[at], result.coefficients)
            _accumulate(inputs, hidden_grad, head_grad, at, dlogits, hidden)
        elif live.numel():
            dlogits = logits.gradient(chunk, at, lse[at], logp[at], result.coefficients, live)
            _accumulate(inputs, hidden_grad, head_grad, live + at.start, dlogits, hidden[live])
    return _concatenate(results, inputs), logp, _finish(inputs, hidden_grad, head_grad, lift)


def rank_recomputed(
    inputs: Inputs, ranking: Ranking, plan: Plan
) -> tuple[RankResult, Tensor, Gradients]:
    """``recompute``: a group is larger than the budget, so its logits are made a second time, for
    the live rows alone."""
    lse, logp = logprobs(inputs, plan.chunk_rows)
    result = _rank_all(inputs, ranking, logp)
    gradients = backward(
        inputs,
        lse,
        logp,
        result.coefficients,
        None,
        plan.chunk_rows,
        drop_dead_rows=ranking.drop_dead_rows,
    )
    return result, logp, gradients


def rank_by_unit_gradient(
    inputs: Inputs, ranking: Ranking, plan: Plan
) -> tuple[RankResult, Tensor, Gradients]:
    """``unit``: a group is larger than the budget and the head is frozen."""
    _, logp, unit = logprobs_and_unit_gradient(inputs, plan.chunk_rows)
    result = _rank_all(inputs, ranking, logp)
    return result, logp, scale_unit_gradient(inputs, unit, result.coefficients)


def rank_forward(
    inputs: Inputs, ranking: Ranking, plan: Plan
) -> tuple[RankResult, Tensor, Gradients]:
    """``forward``: nothing needs a gradient; one product."""
    _, logp = logprobs(inputs, plan.chunk_rows)
    return _rank_all(inputs, ranking, logp), logp, Gradients(None, None, None)


def _rank_all(inputs: Inputs, ranking: Ranking, logp: Tensor) -> RankResult:
    return inputs.backend.rank_tokens(
        logp,
        ranking.rewards,
        ranking.cu_responses,
        ranking.cu_groups,
        ranking.reference_scores,
        ranking.spec,
        ranking.scale,
    )


def _rank(
    inputs: Inputs,
    ranking: Ranking,
    logp: Tensor,
    groups: tuple[int, int],
    group_offsets: list[int],
    token_offsets: list[int],
) -> RankResult:
    """Rank the groups ``[first, last)`` of a chunk, whose offsets are made to start at 0."""
    first, last = groups
    begin, end = group_offsets[first], group_offsets[last]
    reference = ranking.reference_scores
    part = ranking._replace(
        rewards=ranking.rewards[begin:end],
        cu_responses=ranking.cu_responses[begin : end + 1] - token_offsets[first],
        cu_groups=ranking.cu_groups[first : last + 1] - begin,
        reference_scores=None if reference is None else reference[begin:end],
    )
    return _rank_all(inputs, part, logp)


def _live_or_none(inputs: Inputs, ranking: Ranking, coefficients: Tensor) -> Tensor | None:
    if not ranking.drop_dead_rows:
        return None
    live = inputs.backend.live_rows(coefficients)
    return None if live.numel() == coefficients.numel() else live


def _concatenate(results: list[RankResult], inputs: Inputs) -> RankResult:
    if len(results) == 1:
        return results[0]
    # An operator's results may not share memory: without any chunk each needs its own empty tensor.
    device, dtype = inputs.hidden.device, accumulation_dtype(inputs.hidden.dtype)
    empty = [torch.empty(0, dtype=dtype, device=device)]
    return RankResult(*(torch.cat([r[i] for r in results] or empty) for i in range(4)))


def _stats(inputs: Inputs, logits: Tensor, at: slice) -> tuple[Tensor, Tensor]:
    return inputs.backend.row_stats(
        logits, inputs.labels[at], inputs.bias, inputs.logit_scale, inputs.softcap
    )


def _token_stats(inputs: Inputs) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(inputs.hidden.dtype)
    lse = torch.empty(inputs.num_tokens, dtype=dtype, device=inputs.hidden.device)
    return lse, torch.empty_like(lse)


def _row_chunks(rows: int, chunk_rows: int) -> list[slice]:
    return [slice(start, min(start + chunk_rows, rows)) for start in range(0, rows, chunk_rows)]


def _make_grads(
    inputs: Inputs, *, zero: bool, chunks: int
) -> tuple[HiddenGrad | None, HeadGrad | None]:
    hidden_grad = head_grad = None
    if inputs.need_hidden:
        hidden_grad = HiddenGrad(inputs.num_tokens, inputs.hidden, inputs.hidden.dtype, zero=zero)
    if inputs.need_head:
        head_grad = HeadGrad(
            inputs.weight,
            need_weight=inputs.need_weight,
            need_bias=inputs.need_bias,
            single_chunk=chunks == 1,
        )
    return hidden_grad, head_grad


def _accumulate(
    inputs: Inputs,
    hidden_grad: HiddenGrad | None,
    head_grad: HeadGrad | None,
    at: slice | Tensor,
    dlogits: Tensor,
    hidden: Tensor,
) -> None:
    if hidden_grad is not None:
        hidden_grad.add(at, dlogits, inputs.weight)
    if head_grad is not None:
        head_grad.add(dlogits, hidden)


def _finish(
    inputs: Inputs,
    hidden_grad: HiddenGrad | None,
    head_grad: HeadGrad | None,
    lift: float | Tensor | None,
) -> Gradients:
    hidden = None
    if hidden_grad is not None:
        hidden = scatter_rows(hidden_grad.grad, inputs.rows, inputs.hidden.shape[0])
    weight, bias = (None, None) if head_grad is None else head_grad.finish()
    if lift is not None:
        for grad in (hidden, weight, bias):
            if grad is not None:
                grad /= lift
    return Gradients(hidden, weight, bias)
