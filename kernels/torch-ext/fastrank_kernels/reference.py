"""The operators in plain torch: the specification, and the CPU implementation.

A Triton kernel is held against these functions, in float64 where it matters. They are written to be
read next to the formulas and are still fast enough to serve a CPU: row blocks that stay in cache
while they are upcast, groups padded to a common width and handled together.

Shapes: T response tokens, C candidates, G groups, V vocabulary entries. Offsets are int32
``[C + 1]`` and ``[G + 1]`` and start at 0, like flash-attn's ``cu_seqlens``.
"""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch
from torch import Tensor

from .spec import RankSpec

# float32 elements of one row block: 2 MiB, which stay in a processor's cache between operators and
# are enough that calling an operator costs little beside them.
_BLOCK_ELEMENTS = 1 << 19
# Elements of one [groups, n, n] temporary; more groups are handled in slices.
_PAIR_ELEMENTS = 1 << 22


class RankResult(NamedTuple):
    """Result of the rank operator for whole groups."""

    rank_loss: Tensor
    """[G] ranking term of each group, unscaled."""
    sft_loss: Tensor
    """[G] supervised term of each group, weight included, unscaled."""
    scores: Tensor
    """[C] length-normalised log-probabilities."""
    coefficients: Tensor
    """[T] derivative of ``scale * (rank_loss + sft_loss).sum()`` by each log-probability."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and exponentials: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_stats(
    logits: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    *,
    sharded: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and label log-probability of each row of a logits chunk.

    ``logits`` [rows, V] is the bare product of hidden rows and head; with
    ``z = cap(logit_scale * (logits + bias))`` the results are ``lse = logsumexp(z)`` and
    ``logp = z[label] - lse``, both [rows] in float32 (float64 for float64 logits).
    A label outside the vocabulary gives NaN in ``logp``.

    ``sharded``: the columns are a part of the vocabulary. The second result is then
    ``z[label]`` of the labels in this part, and 0 for the others.
    """
    rows, vocab = logits.shape
    dtype = accumulation_dtype(logits.dtype)
    lse = torch.empty(rows, dtype=dtype, device=logits.device)
    logp = torch.empty_like(lse)
    valid = (labels >= 0) & (labels < vocab)
    safe_labels = labels.clamp(0, max(vocab - 1, 0))
    scratch = _block_memory(vocab, dtype, logits.device)
    for start, stop in _row_blocks(rows, vocab):
        z = _final_logits(logits[start:stop], bias, logit_scale, softcap, scratch)
        target = z.gather(1, safe_labels[start:stop, None]).squeeze(1)
        top = z.amax(-1, keepdim=True)
        top.masked_fill_(top.isinf(), 0.0)
        total = torch.sub(z, top, out=scratch[: stop - start]).exp_().sum(-1)
        block_lse = total.log_().add_(top.squeeze(1))
        lse[start:stop] = block_lse
        if sharded:
            logp[start:stop] = target
            continue
        # Rounding can lift the label's logit above the log-sum-exp; a log-probability is never > 0.
        logp[start:stop] = (target - block_lse).clamp_(max=0.0)
    return lse, logp.masked_fill_(~valid, 0.0 if sharded else float("nan"))


def dlogits(
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    logp: Tensor,
    coefficients: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    *,
    out: Tensor,
    live: Tensor | None = None,
    sharded: bool = False,
) -> Tensor:
    """Gradient of ``sum_t coefficients_t * logp_t`` by the bare logits, written into ``out``.

    ``out`` [rows, V] may be ``logits`` itself, or a narrower type laid over its memory row by row.
    With ``live`` (int64, rising), only those rows are written, one after the other from the top,
    and ``out[: len(live)]`` is returned. In place this is safe: a row only ever moves up, and the
    blocks go upwards.

    ``onehot - p`` is formed in float32, as ``-expm1(logp)`` at the label, before the coefficient
    and before any cast: subtracting rounded probabilities would lose confident tokens.

    ``sharded``: the columns are a part of the vocabulary, ``lse`` and ``logp`` are over all of it,
    and a label may lie in another part.
    """
    rows, vocab = logits.shape
    dtype = accumulation_dtype(logits.dtype)
    count = rows if live is None else live.numel()
    scratch = _block_memory(vocab, dtype, logits.device)
    moved = None if live is None else _block_memory(vocab, logits.dtype, logits.device)
    for start, stop in _row_blocks(count, vocab):
        take: slice | Tensor = slice(start, stop)
        if live is None or moved is None:
            block = logits[take]
        else:
            take = live[take]
            block = torch.index_select(logits, 0, take, out=moved[: stop - start])
        z = _final_logits(block, bias, logit_scale, softcap, scratch)
        c = coefficients[take].to(dtype)
        label = labels[take].clamp(0, max(vocab - 1, 0))[:, None]
        slope = None
        if softcap is not None:
            slope = 1.0 - (z / softcap).square_()
        # z may be a view of `logits` (nothing was applied): `out` is written last.
        grad = torch.sub(z, lse[take, None], out=scratch[: stop - start]).exp_()
        grad *= -c[:, None]
        at_label = (-torch.expm1(logp[take]) * c)[:, None]
        if sharded:
            at_label = torch.where(label == labels[take][:, None], at_label, grad.gather(1, label))
        grad.scatter_(1, label, at_label)
        if slope is not None:
            grad *= slope
        if logit_scale != 1.0:
            grad *= logit_scale
        out[start:stop] = grad
    return out[:count]


def unit_dlogits(
    logits: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    *,
    out: Tensor,
) -> tuple[Tensor, Tensor]:
    """Label log-probability of each row of a logits chunk and its gradient, in one pass.

    Returns ``logp`` and ``factor``, both [rows] in float32 (float64 for float64 logits), such that
    ``factor[:, None] * out`` is the derivative of each row's ``logp`` by the bare logits. ``out``
    [rows, V] may lie over ``logits`` as in `dlogits`; what it holds are exponentials relative to
    the row's maximum, so that it may be narrow before the factor is known. A label outside the
    vocabulary gives NaN in ``logp`` and at one place of ``out``.
    """
    rows, vocab = logits.shape
    dtype = accumulation_dtype(logits.dtype)
    logp = torch.empty(rows, dtype=dtype, device=logits.device)
    factor = torch.empty_like(logp)
    valid = (labels >= 0) & (labels < vocab)
    safe_labels = labels.clamp(0, max(vocab - 1, 0))
    scratch = _block_memory(vocab, dtype, logits.device)
    for start, stop in _row_blocks(rows, vocab):
        z = _final_logits(logits[start:stop], bias, logit_scale, softcap, scratch)
        label, known = safe_labels[start:stop, None], valid[start:stop, None]
        target = z.gather(1, label)
        top = z.amax(-1, keepdim=True)
        top.masked_fill_(top.isinf(), 0.0)
        slope = None if softcap is None else 1.0 - (z / softcap).square_()
        # z may be a view of `logits` (nothing was applied): `out` is written last.
        grad = torch.sub(z, top, out=scratch[: stop - start]).exp_()
        at_label = grad.gather(1, label)
        rest = grad.scatter_(1, label, 0.0).sum(-1, keepdim=True)
        total = rest + at_label
        # Rounding can lift the label's logit above the log-sum-exp.
        logp[start:stop] = (target - (top + total.log())).clamp_(max=0.0).squeeze(1)
        factor[start:stop] = (-logit_scale / total).squeeze(1)
        grad.scatter_(1, label, torch.where(known, -rest, float("nan")))
        out[start:stop] = grad if slope is None else grad.mul_(slope)
    return logp.masked_fill_(~valid, float("nan")), factor


def rescale_(values: Tensor, factor: Tensor) -> Tensor:
    """Multiply ``values`` in place by ``factor`` [], in float32 at least; by 1, nothing is done."""
    if values.device.type != "cpu":
        return values.mul_(factor)
    number = float(factor)
    return values if number == 1.0 else values.mul_(number)


def live_rows(coefficients: Tensor) -> Tensor:
    """Indices (int64, rising) of the live rows: those with a coefficient that is not exactly zero.
    NaN is live."""
    return torch.nonzero(coefficients).squeeze(1)


def live_candidates(coefficients: Tensor, cu_responses: Tensor) -> Tensor:
    """bool [C]: whether a candidate's rows are live; its tokens share one coefficient."""
    first_tokens = cu_responses[:-1].long().to(coefficients.device)
    return coefficients[first_tokens] != 0


def segment_sum(values: Tensor, offsets: Tensor) -> Tensor:
    """Sum of each segment ``values[offsets[i]:offsets[i + 1]]`` as [segments], in values' dtype
    (float32 at least), accumulated in float64 and in a fixed order."""
    offsets = offsets.to(values.device).long()
    sums = torch.segment_reduce(values.to(torch.float64), "sum", offsets=offsets, initial=0)
    return sums.to(accumulation_dtype(values.dtype))


def group_scale(scale: float | None, cu_groups: Tensor) -> float:
    """``scale``, or for None that of a mean over groups; symbolic under a compiler."""
    if scale is not None:
        return scale
    mean: float = 1.0 / torch.sym_max(cu_groups.shape[0] - 1, 1)
    return mean


def segment_index(offsets: Tensor, total: int) -> Tensor:
    """int64 [total]: which segment each element belongs to."""
    lengths = (offsets[1:] - offsets[:-1]).long()
    segments = torch.arange(lengths.numel(), device=offsets.device)
    return torch.repeat_interleave(segments, lengths, output_size=total)


def length_divisor(lengths: Tensor, exponent: float) -> Tensor:
    """``|y|^α`` of responses of these lengths; exact for a mean (1) and a sum (0)."""
    if exponent == 1.0:
        return lengths
    return torch.ones_like(lengths) if exponent == 0.0 else lengths**exponent


def rank_tokens(
    token_logprobs: Tensor,
    rewards: Tensor,
    cu_responses: Tensor,
    cu_groups: Tensor,
    reference_scores: Tensor | None,
    spec: RankSpec,
    scale: float,
) -> RankResult:
    """From token log-probabilities of whole groups to the loss and its derivative by each of them.

    Three steps, which a GPU kernel does in one launch: segmented sums to scores, the loss and its
    score gradients (`rank_scores`), and the coefficients
    ``c_t = scale * (g_i / |y_i|^α - [i best] * weight * (1 or 1 / |y_i|))``, α the exponent of the
    length (1 where a score is a mean, 0 where it is a sum).
    """
    dtype = accumulation_dtype(token_logprobs.dtype)
    device = token_logprobs.device
    responses = segment_index(cu_responses, token_logprobs.shape[0]).to(device)
    lengths = (cu_responses[1:] - cu_responses[:-1]).to(device=device, dtype=dtype)
    sums = segment_sum(token_logprobs, cu_responses).to(dtype)
    means = sums / lengths
    divisor = length_divisor(lengths, spec.length_exponent)
    scores = sums / divisor
    ranked = scores if reference_scores is None else scores - reference_scores.to(dtype)
    rank_loss, score_grads = rank_scores(ranked, rewards, cu_groups, None, spec)
    per_candidate = score_grads / divisor

    weight = sft_weights(rewards.to(device), cu_groups, spec, dtype)
    best_term = means if spec.sft_reduction == "mean" else sums
    # where, not a product: a candidate that is not the best may have a score of -inf.
    zero = torch.zeros((), dtype=dtype, device=device)
    sft_loss = segment_sum(torch.where(weight != 0, -weight * best_term, zero), cu_groups).to(dtype)
    sft_grad = weight / lengths if spec.sft_reduction == "mean" else weight
    coefficients = ((per_candidate - sft_grad) * scale)[responses]
    return RankResult(rank_loss, sft_loss, scores, coefficients)


def equal_offsets(scores: Tensor) -> Tensor:
    """int32 [G + 1] beside ``scores`` [G, n], the offsets of groups of one size."""
    groups, width = scores.shape
    return torch.arange(groups + 1, dtype=torch.int32, device=scores.device) * width


def rank_scores(
    scores: Tensor,
    rewards: Tensor,
    cu_groups: Tensor | None,
    valid: Tensor | None,
    spec: RankSpec,
) -> tuple[Tensor, Tensor]:
    """Ranking term [G] of each group and its gradient by the scores; float32 at least.

    ``scores`` and ``rewards`` [C], or [G, n] without ``cu_groups``. ``valid`` (bool, of that shape)
    leaves candidates out: they get gradient 0 whatever their score is.
    """
    dtype = accumulation_dtype(scores.dtype)
    device = scores.device
    if cu_groups is None:
        width = scores.shape[1]
        if valid is None and 2 <= width and scores.numel() * width <= _PAIR_ELEMENTS:
            return _rank_padded(scores.to(dtype), rewards.to(device, dtype), None, spec)
        valid = None if valid is None else valid.reshape(-1)
        loss, grads = rank_scores(
            scores.reshape(-1), rewards.reshape(-1), equal_offsets(scores), valid, spec
        )
        return loss, grads.view(scores.shape)
    cu_groups = cu_groups.to(device)
    num_groups = cu_groups.numel() - 1
    width = int((cu_groups[1:] - cu_groups[:-1]).max()) if num_groups else 0
    if width < 2:
        return (
            torch.zeros(num_groups, dtype=dtype, device=device),
            torch.zeros(scores.shape[0], dtype=dtype, device=device),
        )
    step = max(1, _PAIR_ELEMENTS // (width * width))
    if valid is None and num_groups * width == scores.shape[0] and num_groups <= step:
        # Groups of one size, as most data has them: nothing to gather, nothing to leave out.
        u, r = scores.to(dtype).view(-1, width), rewards.to(device, dtype).view(-1, width)
        group_loss, group_grads = _rank_padded(u, r, None, spec)
        return group_loss, group_grads.reshape(-1)
    loss = torch.zeros(num_groups, dtype=dtype, device=device)
    grads = torch.zeros(scores.shape[0], dtype=dtype, device=device)
    for first in range(0, num_groups, step):
        offsets = cu_groups[first : first + step + 1].long()
        index = offsets[:-1, None] + torch.arange(width, device=device)
        present = index < offsets[1:, None]
        index = index.clamp_(max=scores.shape[0] - 1)
        if valid is not None:
            present = present & valid.to(device)[index]
        u = torch.where(present, scores[index].to(dtype), 0.0)
        r = torch.where(present, rewards.to(device)[index].to(dtype), 0.0)
        loss[first : first + step], group_grads = _rank_padded(u, r, present, spec)
        grads[index[present]] = group_grads[present]
    return loss, grads


def _rank_padded(
    scores: Tensor, rewards: Tensor, present: Tensor | None, spec: RankSpec
) -> tuple[Tensor, Tensor]:
    """Loss [G] and score gradients [G, n]; places that are not ``present`` hold zeros. None: every
    place holds a candidate."""
    u = scores * spec.score_scale if spec.score_scale != 1.0 else scores
    if spec.rank_weight == 0:
        # Left out, not multiplied: a term that is infinite must not turn into NaN.
        return torch.zeros_like(u[:, 0]), torch.zeros_like(u)
    if spec.form == "pairwise":
        loss, grads = _pairwise(u, rewards, present, spec)
    else:
        if present is None:
            present = _everywhere(u)
        loss, grads = _FORMS[spec.form](u, rewards, present, spec)
        ranked = _has_strict_pair(rewards, present)
        loss = torch.where(ranked, loss, 0.0)
        grads = torch.where(ranked[:, None], grads, 0.0)
    factor = spec.rank_weight * spec.score_scale
    if spec.rank_weight != 1.0:
        loss = loss * spec.rank_weight
    return loss, grads * factor if factor != 1.0 else grads


def _everywhere(values: Tensor) -> Tensor:
    return torch.ones((), dtype=torch.bool, device=values.device).expand(values.shape)


def _places(values: Tensor, present: Tensor) -> Tensor:
    """Place of each value in falling order, ties by index: int64 [G, n], 0 is the largest. What is
    not present stands behind all others. position_i = Σ_j [v_j > v_i] + [v_j = v_i and j < i] needs
    no sort."""
    earlier = torch.ones(
        values.shape[1], values.shape[1], dtype=torch.bool, device=values.device
    ).tril(-1)
    left, right = values[:, :, None], values[:, None, :]
    before = ((right > left) | ((right == left) & earlier)) & present[:, None, :]
    return torch.where(present, before.sum(-1), values.shape[1])


def _has_strict_pair(rewards: Tensor, present: Tensor) -> Tensor:
    high = torch.where(present, rewards, float("-inf")).amax(-1)
    low = torch.where(present, rewards, float("inf")).amin(-1)
    return high > low


def _pairwise(
    u: Tensor, r: Tensor, present: Tensor | None, spec: RankSpec
) -> tuple[Tensor, Tensor]:
    """Form A: Σ_{r_i > r_j} w_ij φ(u_i − u_j − m_ij); g_i = Σ_j w_ij φ' − Σ_j w_ji φ'. Zeros where
    a group has no strict pair."""
    pair = r.unsqueeze(2) > r.unsqueeze(1)
    if present is not None:
        pair = pair & present[:, :, None] & present[:, None, :]
    elif spec.pairs == "best_worst" or spec.pair_weight == "lambda" or spec.margin_by == "rank":
        present = _everywhere(u)
    here = cast(Tensor, present)  # what is None is not looked at below
    if spec.pairs == "best_worst":
        place = _places(r, here)
        last = here.sum(-1)[:, None] - 1
        pair = pair & (place == 0)[:, :, None] & (place == last)[:, None, :]
    # How far a pair is from its order, -z: value and slope are those of φ(-x).
    x = u.unsqueeze(1) - u.unsqueeze(2)
    if spec.margin:
        x = x + _margins(r, here, spec)
    if spec.phi == "hinge":
        # What is no pair has no loss. Clamping and rounding up keep NaN, a comparison would not.
        x = torch.where(pair, x, 0.0)
        value = torch.relu(x)
        slope = value.clamp(max=1.0).ceil_()
    elif spec.phi == "logistic":
        # softplus(x); torch's own softplus switches to the identity at a threshold.
        value, slope = -torch.nn.functional.logsigmoid(-x), torch.sigmoid(x)
        if spec.wrong:
            flipped = -torch.nn.functional.logsigmoid(x)
            value = spec.right * value + spec.wrong * flipped
            slope = spec.right * slope - spec.wrong * torch.sigmoid(-x)
    else:
        value, slope = x * x, 2.0 * x
    if spec.pair_weight == "lambda":
        weight = _lambda_weights(u, r, here)
        value, slope = value * weight, slope * weight
    if spec.phi != "hinge":
        value, slope = torch.where(pair, value, 0.0), torch.where(pair, slope, 0.0)
    return value.sum((1, 2)), slope.sum(1) - slope.sum(2)


def _margins(r: Tensor, present: Tensor, spec: RankSpec) -> Tensor | float:
    """m_ij of each pair, i the better one."""
    if spec.margin_by == "reward":
        return spec.margin * (r[:, :, None] - r[:, None, :])
    if spec.margin_by == "rank":
        place = _places(r, present).to(r.dtype)
        return spec.margin * (place[:, None, :] - place[:, :, None])
    return spec.margin


def _lambda_weights(u: Tensor, r: Tensor, present: Tensor) -> Tensor:
    """LiPO-λ (arXiv:2402.01878): |G_i − G_j| · |1/D(τ_i) − 1/D(τ_j)| with gain 2^ψ − 1, ψ the
    reward scaled to [0, 1] in its group, discount log(1 + τ), τ the rank by the current scores."""
    gain = _gains(r, present)
    rank = 1.0 + _places(u, present).to(u.dtype)
    discount = 1.0 / torch.log1p(rank)
    return (gain[:, :, None] - gain[:, None, :]).abs() * (
        discount[:, :, None] - discount[:, None, :]
    ).abs()


def _gains(r: Tensor, present: Tensor) -> Tensor:
    """2^ψ − 1, ψ the reward scaled to [0, 1] in its group."""
    high = torch.where(present, r, float("-inf")).amax(-1, keepdim=True)
    low = torch.where(present, r, float("inf")).amin(-1, keepdim=True)
    spread = torch.where(high > low, high - low, 1.0)
    return torch.exp2((r - low) / spread) - 1.0


def _staged(u: Tensor, r: Tensor, present: Tensor, spec: RankSpec) -> tuple[Tensor, Tensor]:
    """Form B: Σ_k [logsumexp_{i ≥ k}(a_ki u_i) − a_kk u_k] in order of falling reward;
    g_i = Σ_k a_ki (p_ki − [i = k])."""
    width = u.shape[1]
    place = _places(r, present)
    order = torch.argsort(place, dim=1, stable=True)
    u, r, here = u.gather(1, order), r.gather(1, order), present.gather(1, order)
    count = here.sum(-1)[:, None]
    stage = torch.arange(width, device=u.device)
    active = stage < count - 1
    if spec.top_k:
        active = active & (stage < spec.top_k)
    if spec.stage_scale == "reward_gap":
        lowest = torch.where(here, r, float("inf")).amin(-1, keepdim=True)
        a = r[:, :, None] - r[:, None, :]
        a_own = r - lowest
        # A stage without a strictly worse candidate is a constant: it has nothing to teach.
        active = active & (a_own > 0)
        a = torch.where(torch.eye(width, dtype=torch.bool, device=u.device), a_own[:, :, None], a)
    else:
        a_own = torch.ones_like(u)
        a = a_own[:, :, None].expand(-1, -1, width)
    member = (stage[None, :] >= stage[:, None]) & here[:, None, :] & active[:, :, None]
    logits = torch.where(member, a * u[:, None, :], float("-inf"))
    top = logits.amax(-1, keepdim=True)
    top = torch.where(top == float("-inf"), 0.0, top)
    weights = torch.exp(logits - top)
    total = weights.sum(-1, keepdim=True)
    total = torch.where(total == 0, 1.0, total)
    lse = (top + torch.log(total)).squeeze(-1)
    loss = torch.where(active, lse - a_own * u, 0.0).sum(-1)
    slope = torch.where(member, a * (weights / total), 0.0).sum(1)
    slope = slope - torch.where(active, a_own, 0.0)
    return loss, torch.zeros_like(u).scatter_(1, order, slope)


def _softmax(u: Tensor, r: Tensor, present: Tensor, spec: RankSpec) -> tuple[Tensor, Tensor]:
    """Form C: −Σ q_i log softmax(u)_i with q = softmax(r / temperature); g = softmax(u) − q."""
    logp = torch.log_softmax(u.masked_fill(~present, float("-inf")), dim=-1)
    q = _target(r, present, spec)
    logp = torch.where(present, logp, 0.0)
    return -(q * logp).sum(-1), torch.where(present, torch.exp(logp), 0.0) - q


def _expected(u: Tensor, r: Tensor, present: Tensor, spec: RankSpec) -> tuple[Tensor, Tensor]:
    """Form D: −Σ p_i v_i with p = softmax(u); g_i = −p_i (v_i − Σ p v)."""
    p = torch.softmax(u.masked_fill(~present, float("-inf")), dim=-1)
    value = _target(r, present, spec) if spec.target == "softmax" else r
    mean = (p * value).sum(-1, keepdim=True)
    return -mean.squeeze(-1), -p * (value - mean)


def _pointwise(u: Tensor, r: Tensor, present: Tensor, spec: RankSpec) -> tuple[Tensor, Tensor]:
    """Form E: −Σ [q_i log σ(u_i) + log σ(−u_i) / n]; g_i = σ(u_i) / n − q_i σ(−u_i)."""
    q, share = _target(r, present, spec), 1.0 / present.sum(-1, keepdim=True).to(u.dtype)
    log_sigmoid = torch.nn.functional.logsigmoid
    value = -(q * log_sigmoid(u) + share * log_sigmoid(-u))
    slope = share * torch.sigmoid(u) - q * torch.sigmoid(-u)
    return torch.where(present, value, 0.0).sum(-1), torch.where(present, slope, 0.0)


def _positions(u: Tensor, r: Tensor, present: Tensor, spec: RankSpec) -> tuple[Tensor, Tensor]:
    """Form F: 1 − Σ_k G_k / log2(1 + π_k) / ideal, π_k = 1 + Σ_{j ≠ k} σ(u_j − u_k);
    g_i = Σ_{j ≠ i} (w_j − w_i) σ'(u_i − u_j), w_k the derivative by π_k."""
    width = u.shape[1]
    others = present[:, :, None] & present[:, None, :]
    others = others & ~torch.eye(width, dtype=torch.bool, device=u.device)
    difference = u[:, None, :] - u[:, :, None]
    ahead = torch.where(others, torch.sigmoid(difference), 0.0)
    reach = 2.0 + ahead.sum(-1)
    log_place = torch.log(reach)
    log_ideal_place = torch.log1p(1.0 + _places(r, present).to(u.dtype))
    gain = torch.where(present, _gains(r, present), 0.0) * math.log(2)
    ideal = (gain / log_ideal_place).sum(-1, keepdim=True)
    weight = gain / (reach * log_place.square() * ideal)
    slope = torch.where(others, torch.sigmoid(difference) * torch.sigmoid(-difference), 0.0)
    grads = (slope * (weight[:, None, :] - weight[:, :, None])).sum(-1)
    return 1.0 - (gain / log_place / ideal).sum(-1), grads


def _target(r: Tensor, present: Tensor, spec: RankSpec) -> Tensor:
    """The target distribution q = softmax(r / temperature), 0 at places that are not present."""
    q = torch.softmax((r / spec.temperature).masked_fill(~present, float("-inf")), dim=-1)
    return torch.where(present, q, 0.0)


_FORMS = {
    "staged": _staged,
    "softmax": _softmax,
    "expected": _expected,
    "pointwise": _pointwise,
    "positions": _positions,
}


def sft_weights(rewards: Tensor, cu_groups: Tensor, spec: RankSpec, dtype: torch.dtype) -> Tensor:
    """[C] weight of the supervised term: λ at the best candidate of each group (the first of the
    highest), 0 elsewhere."""
    cu_groups = cu_groups.to(rewards.device)
    # One place more than candidates: the best of an empty group.
    weights = torch.zeros(rewards.shape[0] + 1, dtype=dtype, device=rewards.device)
    counts = (cu_groups[1:] - cu_groups[:-1]).long()
    if spec.sft_weight == 0 or not rewards.numel():
        return weights[:-1]
    groups = segment_index(cu_groups, rewards.shape[0])
    highest = torch.full(
        (counts.numel(),), float("-inf"), dtype=rewards.dtype, device=rewards.device
    )
    highest.scatter_reduce_(0, groups, rewards, "amax")
    candidate = torch.arange(rewards.shape[0], device=rewards.device)
    tied = torch.where(rewards == highest[groups], candidate, rewards.shape[0])
    best = torch.full_like(counts, rewards.shape[0]).scatter_reduce_(0, groups, tied, "amin")
    growth = torch.ones_like(counts, dtype=dtype)
    if spec.sft_growth == "square":
        growth = (counts - 1).to(dtype).square()
    return weights.scatter_(0, best, spec.sft_weight * growth)[:-1]


def _final_logits(
    logits: Tensor, bias: Tensor | None, scale: float, softcap: float | None, scratch: Tensor
) -> Tensor:
    """z = κ tanh(σ(u + b) / κ), or σ(u + b), of a block of rows, in scratch's dtype: a view of
    ``logits`` if there is nothing to do, else in ``scratch``."""
    if logits.dtype == scratch.dtype and bias is None and scale == 1.0 and softcap is None:
        return logits
    z = scratch[: logits.shape[0]].copy_(logits)
    if bias is not None:
        z += bias.to(z.dtype)
    if scale != 1.0:
        z *= scale
    if softcap is not None:
        z.div_(softcap).tanh_().mul_(softcap)
    return z


def _block_memory(vocab: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for one row block, used again for each: a C library that maps every new one afresh
    spends more on its pages than the arithmetic takes."""
    return torch.empty(_block_rows(vocab), vocab, dtype=dtype, device=device)


def _block_rows(vocab: int) -> int:
    return max(1, _BLOCK_ELEMENTS // max(vocab, 1))


def _row_blocks(rows: int, vocab: int) -> list[tuple[int, int]]:
    step = _block_rows(vocab)
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]
