# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The rank kernel: one program takes a whole group from token log-probabilities to coefficients.

Three stages with a barrier between them: scores of the candidates; what each candidate must know of
all others (`rank_forms.prepare_*`); loss, score gradients and the coefficient of every token. Any
group size is served by the same code: an n x n comparison is walked in blocks of ROWS x COLUMNS
held in registers, 64 x 32 at most: one block for n <= 32, two for n <= 64. A block of 64 x 64 works
too, at up to twice the registers.

Scores pass through global memory between the stages even where one block holds the group. Keeping
them in registers would save a fraction of a microsecond and cost a second copy of every form.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rank_forms import (
    expected_terms,
    load_block,
    pairwise_rows,
    pointwise_rows,
    positions_rows,
    prepare_expected,
    prepare_places,
    prepare_positions,
    prepare_softmax,
    prepare_staged,
    softmax_rows,
    staged_rows,
)

RUN_TIME_ARGUMENTS = (
    "token_logprobs",
    "scores",
    "rewards",
    "cu_responses",
    "cu_groups",
    "reference_scores",
    "valid",
    "rank_loss",
    "sft_loss",
    "score_grads",
    "coefficients",
    "scratch",
    "num_tokens",
    "num_candidates",
    "top_k",
    "sft_mean",
    "sft_square",
)


@triton.jit
def load_segments(index, present, cu_responses, num_tokens):
    """Token range of each response, kept inside the tokens whatever the offsets say."""
    start = tl.load(cu_responses + index, mask=present, other=0).to(tl.int32)
    stop = tl.load(cu_responses + index + 1, mask=present, other=0).to(tl.int32)
    start = tl.maximum(start, 0)
    return start, tl.maximum(tl.minimum(stop, num_tokens), start)


@triton.jit
def length_divisor(length, exponent):
    """``|y|^α``, exactly 1 and ``|y|`` where a score is a sum (α of 0) or a mean (1)."""
    power = tl.exp2(exponent * tl.log2(length))
    return tl.where(exponent == 1.0, length, tl.where(exponent == 0.0, 1.0, power))


@triton.jit
def write_scores(
    first,
    size,
    token_logprobs,
    scores,
    cu_responses,
    num_tokens,
    length_exponent,
    ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Score of each response: the sum of its token log-probabilities, accumulated in float64, over
    ``|y|^α``."""
    for row in range(0, size, ROWS):
        place = row + tl.arange(0, ROWS)
        present = place < size
        start, stop = load_segments(first + place, present, cu_responses, num_tokens)
        longest = tl.max(stop - start, 0)
        total = tl.zeros((ROWS, BLOCK_T), tl.float64)
        for offset in range(0, longest, BLOCK_T):
            token = start[:, None] + offset + tl.arange(0, BLOCK_T)[None, :]
            inside = token < stop[:, None]
            total += tl.load(token_logprobs + token, mask=inside, other=0.0).to(tl.float64)
        score = tl.sum(total, 1).to(tl.float32)
        length = (stop - start).to(tl.float32)
        score = tl.div_rn(score, length_divisor(length, length_exponent))
        tl.store(scores + first + place, score, mask=present)


@triton.jit
def group_stats(first, size, rewards, valid, ROWS: tl.constexpr):
    """Count, highest and lowest reward, whether the group has a strict pair; and the places of the
    best and the worst in order, and of the best in the rewards' own type (float64 may tell apart
    what float32 ties), each the first of the highest or the last of the lowest."""
    none = 2147483647
    count = 0
    unordered = 0
    high = float("-inf")
    low = float("inf")
    best = none
    worst = -1
    EXACT: tl.constexpr = tl.float64 if rewards.dtype.element_ty == tl.float64 else tl.float32
    peak = tl.full((), float("-inf"), EXACT)
    first_best = none
    for row in range(0, size, ROWS):
        place = row + tl.arange(0, ROWS)
        present = place < size
        if valid is not None:
            present = present & (tl.load(valid + first + place, mask=present, other=0) != 0)
        raw = tl.load(rewards + first + place, mask=present, other=0.0)
        r = raw.to(tl.float32)
        count += tl.sum(present.to(tl.int32), 0)
        unordered += tl.sum((present & (r != r)).to(tl.int32), 0)

        block_high = tl.max(tl.where(present, r, float("-inf")), 0)
        block_best = tl.min(tl.where(present & (r == block_high), place, none), 0)
        best = tl.where((block_high > high) | (best == none), block_best, best)
        high = tl.maximum(high, block_high)

        block_low = tl.min(tl.where(present, r, float("inf")), 0)
        block_worst = tl.max(tl.where(present & (r == block_low), place, -1), 0)
        worst = tl.where((block_low <= low) & (block_worst >= 0), block_worst, worst)
        low = tl.minimum(low, block_low)

        exact = tl.where(present, raw.to(EXACT), float("-inf"))
        block_peak = tl.max(exact, 0)
        block_first = tl.min(tl.where(present & (exact == block_peak), place, none), 0)
        first_best = tl.where((block_peak > peak) | (first_best == none), block_first, first_best)
        peak = tl.maximum(peak, block_peak)
    ranked = (high > low) & (unordered == 0)
    return count, high, low, ranked, best, worst, first_best


@triton.jit
def write_coefficients(
    place,
    grad,
    first,
    size,
    best,
    scores,
    coefficients,
    cu_responses,
    num_tokens,
    scale,
    sft_weight,
    length_exponent,
    sft_mean,
    ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Coefficient of every token of a block of responses; returns their supervised terms."""
    present = place < size
    start, stop = load_segments(first + place, present, cu_responses, num_tokens)
    length = (stop - start).to(tl.float32)
    score = tl.load(scores + first + place, mask=present, other=0.0)
    weight = tl.where(place == best, sft_weight, 0.0)
    divisor = length_divisor(length, length_exponent)
    grad = tl.div_rn(grad, divisor)
    total = tl.where(length > 0.0, score * divisor, 0.0)
    mean = tl.where(length_exponent == 1.0, score, tl.div_rn(total, length))
    if sft_mean != 0:
        term = mean
        pull = tl.div_rn(weight, length)
    else:
        term = total
        pull = weight
    # Selected, not multiplied: a candidate that is not the best may have a score of -inf.
    supervised = tl.where(present & (weight != 0.0), -weight * term, 0.0)
    c = (grad - tl.where(weight != 0.0, pull, 0.0)) * scale
    longest = tl.max(stop - start, 0)
    for offset in range(0, longest, BLOCK_T):
        token = start[:, None] + offset + tl.arange(0, BLOCK_T)[None, :]
        value = tl.broadcast_to(c[:, None], (ROWS, BLOCK_T))
        tl.store(coefficients + token, value, mask=token < stop[:, None])
    return tl.sum(supervised, 0)


# Nothing here gains from knowing an alignment or a divisor, and every one known is another variant
# to compile in the middle of a training run: only what is compiled in selects a variant.
@triton.jit(do_not_specialize=RUN_TIME_ARGUMENTS)
def rank_kernel(
    token_logprobs,
    scores,
    rewards,
    cu_responses,
    cu_groups,
    reference_scores,
    valid,
    rank_loss,
    sft_loss,
    score_grads,
    coefficients,
    scratch,
    num_tokens,
    num_candidates,
    scale,
    score_scale,
    margin,
    right,
    wrong,
    temperature,
    rank_weight,
    top_k,
    sft_weight,
    length_exponent,
    sft_mean,
    sft_square,
    FORM: tl.constexpr,
    PHI: tl.constexpr,
    BEST_WORST: tl.constexpr,
    LAMBDA: tl.constexpr,
    MARGIN_BY: tl.constexpr,
    SMOOTHED: tl.constexpr,
    REWARD_GAP: tl.constexpr,
    TARGET: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    program = tl.program_id(0)
    first = tl.maximum(tl.load(cu_groups + program).to(tl.int32), 0)
    stop = tl.minimum(tl.load(cu_groups + program + 1).to(tl.int32), num_candidates)
    size = stop - first
    group = (first, scores, rewards, reference_scores, valid, score_scale)

    if token_logprobs is not None:
        write_scores(
            first,
            size,
            token_logprobs,
            scores,
            cu_responses,
            num_tokens,
            length_exponent,
            ROWS,
            BLOCK_T,
        )
    count, high, low, ranked, best, worst, first_best = group_stats(
        first, size, rewards, valid, ROWS
    )
    # A term of weight 0 is left out, not multiplied by it: it may be infinite.
    ranked = ranked & (rank_weight != 0.0)
    # A group without a strict pair has ranking term and gradient 0: no column is looked at.
    columns = tl.where(ranked, size, 0)
    if token_logprobs is not None:
        tl.debug_barrier()

    loss = 0.0
    reward_places = scratch
    if LAMBDA:
        prepare_places(columns, group, scratch, False, ROWS, COLUMNS)
        reward_places = scratch + num_candidates
    if MARGIN_BY == "rank":
        prepare_places(columns, group, reward_places, True, ROWS, COLUMNS)
    if LAMBDA or MARGIN_BY == "rank":
        tl.debug_barrier()
    if FORM == "staged":
        loss = prepare_staged(columns, group, scratch, count, low, top_k, REWARD_GAP, ROWS, COLUMNS)
        tl.debug_barrier()
    if FORM == "positions":
        total, ideal = prepare_positions(columns, group, scratch, low, high - low, ROWS, COLUMNS)
        loss = 1.0 - total / ideal
        tl.debug_barrier()
    if (FORM == "softmax") or (FORM == "expected") or (FORM == "pointwise"):
        lse, peak, mass = prepare_softmax(columns, group, temperature, ROWS)
    if FORM == "expected":
        mean = prepare_expected(columns, group, lse, peak, mass, temperature, TARGET, ROWS)
        loss = -mean

    supervised = 0.0
    weight = sft_weight
    if sft_square != 0:
        weight = sft_weight * (count - 1).to(tl.float32) * (count - 1).to(tl.float32)
    for row in range(0, size, ROWS):
        place, present, u, r = load_block(row, size, group, ROWS)
        if FORM == "pairwise":
            terms, grad = pairwise_rows(
                place,
                present,
                u,
                r,
                columns,
                group,
                scratch,
                reward_places,
                margin,
                right,
                wrong,
                low,
                high - low,
                best,
                worst,
                PHI,
                BEST_WORST,
                LAMBDA,
                MARGIN_BY,
                SMOOTHED,
                ROWS,
                COLUMNS,
            )
            loss += tl.sum(terms, 0)
        elif FORM == "staged":
            grad = staged_rows(
                place, present, u, r, columns, group, scratch, low, REWARD_GAP, ROWS, COLUMNS
            )
        elif FORM == "positions":
            grad = positions_rows(place, present, u, columns, group, scratch, ideal, ROWS, COLUMNS)
        elif FORM == "expected":
            p, value = expected_terms(present, u, r, lse, peak, mass, temperature, TARGET)
            grad = -p * (value - mean)
        elif FORM == "pointwise":
            terms, grad = pointwise_rows(present, u, r, count, peak, mass, temperature)
            loss += tl.sum(terms, 0)
        else:
            terms, grad = softmax_rows(present, u, r, lse, peak, mass, temperature)
            loss += tl.sum(terms, 0)
        grad = tl.where(ranked, grad * (score_scale * rank_weight), 0.0)
        if score_grads is not None:
            tl.store(score_grads + first + place, grad, mask=place < size)
        if token_logprobs is not None:
            supervised += write_coefficients(
                place,
                grad,
                first,
                size,
                first_best,
                scores,
                coefficients,
                cu_responses,
                num_tokens,
                scale,
                weight,
                length_exponent,
                sft_mean,
                ROWS,
                BLOCK_T,
            )
    tl.store(rank_loss + program, tl.where(ranked, loss * rank_weight, 0.0))
    if token_logprobs is not None:
        tl.store(sft_loss + program, supervised)
