"""The fused drivers: vendor matrix products around the operators, a few groups of logits at a time.

`forward` and `backward` carry out `planner`'s strategies when the loss comes in between, `rank` the
whole ranking loss; the same for every backend. All take a `Projection` whose hidden rows and weight
are cast. Logits live in one buffer that is used again for each chunk, and their gradient is written
over them.

Memory beside the gradients themselves is one chunk of logits. Matrix products of logits size: 1 to
evaluate, 3 for ``group`` (2 with a frozen head), 3 for ``keep``, 4 for ``recompute``, 2 for
``unit``.

Each chunk's logits are read twice, for statistics and for their gradient, or once where one pass
makes both (`Projection.one_pass`): all but a factor per row, which is known after the ranking and
multiplied into the rows of the products.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .gradients import Gradients, GradientSums, hidden_gradient, scatter_rows, set_rows
from .planner import Plan, group_chunks
from .projection import Logits, Projection, rows_over
from .reference import RankResult, accumulation_dtype
from .spec import RankSpec


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

    def rank(self, call: Projection, logp: Tensor) -> RankResult:
        result: RankResult = call.module.rank_tokens(
            logp, self.rewards, self.cu_responses, self.cu_groups, self.reference_scores,
            self.spec, self.scale,
        )  # fmt: skip
        return result

    def part(self, first: int, last: int, groups: list[int], tokens: list[int]) -> Ranking:
        """The groups ``[first, last)``, given where each group's candidates and tokens begin; the
        part's offsets start at 0."""
        begin, end = groups[first], groups[last]
        reference = self.reference_scores
        return self._replace(
            rewards=self.rewards[begin:end],
            cu_responses=self.cu_responses[begin : end + 1] - tokens[first],
            cu_groups=self.cu_groups[first : last + 1] - begin,
            reference_scores=None if reference is None else reference[begin:end],
        )


class Forward(NamedTuple):
    """Statistics of every label, and what the plan's backward needs beside them."""

    norm: Tensor
    """[T] log-sum-exp of the logits; the factors of ``saved``'s rows if it holds their gradient."""
    logp: Tensor
    """[T]."""
    saved: Tensor
    """``keep``: the logits [T, V], or over their memory the gradient of ``logp`` if that was made
    in the same pass. ``unit``: U [T, D] with ``U_t = ∂logp_t / ∂h_t``. Else empty."""


def forward(call: Projection, plan: Plan) -> Forward:
    """Log-probability of every label, by one product; two for ``unit``."""
    keep, unit = plan.strategy == "keep", None
    norm, logp = _token_stats(call)
    if plan.strategy == "unit":
        unit = hidden_gradient(call, sparse=False)
    chunk_rows = call.num_tokens if keep else plan.chunk_rows
    logits = Logits(call, chunk_rows)
    for at in _row_chunks(call.num_tokens, chunk_rows):
        chunk, factor = logits.make(call.take(at)), None
        if call.one_pass and (keep or unit is not None):
            logp[at], factor, dlogits = logits.unit_gradient(chunk, at)
            norm[at] = factor
        else:
            norm[at], logp[at] = logits.statistics(chunk, at)
            if unit is not None:
                ones = torch.ones_like(logp[at])
                dlogits = logits.gradient(chunk, at, norm[at], logp[at], ones)
        if unit is not None:
            set_rows(call, unit, at, dlogits, factor)
    if unit is not None:
        return Forward(norm, logp, unit)
    return Forward(norm, logp, chunk if keep else norm.new_empty(0))


def backward(
    call: Projection, plan: Plan, done: Forward, coefficients: Tensor, *, drop_dead_rows: bool
) -> Gradients:
    """Gradients of ``Σ_t coefficients_t · logp_t``: by scaling the rows of U (``unit``), from kept
    logits, which stay as they are for another backward (``keep``), or from logits made again, for
    the live rows alone if the dead are dropped (``recompute``)."""
    if plan.strategy == "unit":
        scaled = (done.saved * coefficients[:, None]).to(done.saved.dtype)
        return Gradients(hidden=scatter_rows(scaled, call.rows, call.hidden.shape[0]))
    if plan.strategy == "keep" and call.one_pass:
        return _backward_of_kept_gradient(call, done, coefficients)
    live = _live_or_none(call, coefficients) if drop_dead_rows else None
    lift = None
    if call.hidden.dtype == torch.float16:
        # A power of two, found on the device, that brings the largest coefficient near 1.
        largest = coefficients.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
        lift = torch.exp2(-torch.floor(torch.log2(largest)))
        coefficients = coefficients * lift
    count = call.num_tokens if live is None else live.numel()
    chunks = _row_chunks(count, plan.chunk_rows)
    sums = GradientSums(call, chunks=len(chunks), sparse=live is not None)
    keep = plan.strategy == "keep"
    logits = Logits(call, 0 if keep else max(1, min(plan.chunk_rows, count)))
    for chunk in chunks:
        at = chunk if live is None else live[chunk]
        hidden = call.take(at)
        source = done.saved[at] if keep else logits.make(hidden)
        dlogits = logits.gradient(
            source, at, done.norm[at], done.logp[at], coefficients[at], keep_logits=keep
        )
        sums.add(at, dlogits, hidden)
    return sums.finish(lift)


def _backward_of_kept_gradient(call: Projection, done: Forward, coefficients: Tensor) -> Gradients:
    """``keep`` after one pass: nothing is read or written but by the products."""
    everything = slice(0, call.num_tokens)
    hidden = call.take(everything)
    dlogits = rows_over(done.saved, done.saved, hidden.dtype)
    sums = GradientSums(call, chunks=1, sparse=False)
    sums.add(everything, dlogits, hidden, coefficients * done.norm)
    return sums.finish()


def rank(
    call: Projection, ranking: Ranking, plan: Plan, groups: list[int], tokens: list[int]
) -> tuple[RankResult, Tensor, Gradients]:
    """The rank result, the token log-probabilities, and the gradients of ``scale · Σ_g loss_g``.

    ``groups`` and ``tokens`` [G + 1] are host copies of where each group's candidates and tokens
    begin.
    """
    if plan.strategy == "group":
        return _rank_by_group(call, ranking, plan, groups, tokens)
    done = forward(call, plan)
    result = ranking.rank(call, done.logp)
    if plan.strategy == "forward":
        return result, done.logp, Gradients()
    gradients = backward(
        call, plan, done, result.coefficients, drop_dead_rows=ranking.drop_dead_rows
    )
    return result, done.logp, gradients


def _rank_by_group(
    call: Projection, ranking: Ranking, plan: Plan, groups: list[int], tokens: list[int]
) -> tuple[RankResult, Tensor, Gradients]:
    """``group``: logits of whole groups → statistics → rank → gradient over the logits → dh, dW."""
    chunks = group_chunks(tokens, plan.chunk_rows)
    lse, logp = _token_stats(call)
    sums = GradientSums(call, chunks=len(chunks), sparse=ranking.drop_dead_rows)
    lift = None
    if call.hidden.dtype == torch.float16:
        # Coefficients are of the order of scale / |y|, below what float16 holds once they meet a
        # probability: a power of two brings them near 1 without waiting for their values.
        tokens_per_candidate = call.num_tokens / max(1, ranking.rewards.numel())
        lift = 2.0 ** round(math.log2(max(1.0, tokens_per_candidate) / ranking.scale))
        ranking = ranking._replace(scale=ranking.scale * lift)
    logits = Logits(call, max((tokens[b] - tokens[a] for a, b in chunks), default=0))
    results = []
    one_pass = call.one_pass and not ranking.drop_dead_rows
    for first, last in chunks:
        at = slice(tokens[first], tokens[last])
        hidden = call.take(at)
        chunk = logits.make(hidden)
        part = ranking.part(first, last, groups, tokens)
        if one_pass:
            logp[at], factor, dlogits = logits.unit_gradient(chunk, at)
            results.append(part.rank(call, logp[at]))
            sums.add(at, dlogits, hidden, results[-1].coefficients * factor)
            continue
        lse[at], logp[at] = logits.statistics(chunk, at)
        results.append(part.rank(call, logp[at]))
        coefficients = results[-1].coefficients
        live = _live_or_none(call, coefficients) if ranking.drop_dead_rows else None
        if live is not None and not live.numel():
            continue
        dlogits = logits.gradient(chunk, at, lse[at], logp[at], coefficients, live)
        if live is None:
            sums.add(at, dlogits, hidden)
        else:
            sums.add(live + at.start, dlogits, hidden[live])
    return _concatenate(results, logp), logp, sums.finish(lift)


def _live_or_none(call: Projection, coefficients: Tensor) -> Tensor | None:
    """Indices of the rows with a gradient; None if all have one."""
    live: Tensor = call.module.live_rows(coefficients)
    return None if live.numel() == coefficients.numel() else live


def _concatenate(results: list[RankResult], like: Tensor) -> RankResult:
    if len(results) == 1:
        return results[0]
    # An operator's results may not share memory: without any chunk each needs its own empty tensor.
    empty = [like.new_empty(0)]
    return RankResult(*(torch.cat([r[i] for r in results] or empty) for i in range(4)))


def _token_stats(call: Projection) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(call.hidden.dtype)
    lse = torch.empty(call.num_tokens, dtype=dtype, device=call.hidden.device)
    return lse, torch.empty_like(lse)


def _row_chunks(rows: int, chunk_rows: int) -> list[slice]:
    step = max(1, chunk_rows)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
