# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The forms of a ranking loss as device functions over blocks of a group.

Each form is `prepare_*`, which leaves one number per candidate about all the others in global
scratch memory, and `*_rows`, which takes a block of rows against
all column blocks and returns the rows' share of the loss and their score gradients. A program owns
its group, so what it wrote is visible to it after a barrier; no other program looks.

The candidates of a group are never sorted: candidate k stands before i where ``r_k > r_i``, or
``r_k = r_i`` and ``k < i``, and counting those before gives a position.

Products and sums are not fused here (``fp_fusion=False`` at the launch): ``u_i - u_j`` of equal
scores has to be exactly 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device_math import log1p


@triton.jit
def load_block(start, size, group, BLOCK: tl.constexpr):
    """Place in the group, presence, scaled score and reward of one block of candidates.

    ``group`` is the tuple that the functions here hand on: index of the group's first candidate,
    pointers to scores, rewards, reference scores and validity (the last two may be None), and the
    scores' scale.
    """
    first, scores, rewards, reference_scores, valid, score_scale = group
    place = start + tl.arange(0, BLOCK)
    present = place < size
    index = first + place
    if valid is not None:
        present = present & (tl.load(valid + index, mask=present, other=0) != 0)
    u = tl.load(scores + index, mask=present, other=0.0).to(tl.float32)
    if reference_scores is not None:
        u -= tl.load(reference_scores + index, mask=present, other=0.0).to(tl.float32)
    u = tl.where(present, u * score_scale, 0.0)
    r = tl.load(rewards + index, mask=present, other=0.0).to(tl.float32)
    return place, present, u, r


@triton.jit
def stands_before(r_row, r_column, place_row, place_column):
    """[row, column]: the row's candidate precedes the column's by falling value, ties by index."""
    left, right = r_row[:, None], r_column[None, :]
    return (left > right) | ((left == right) & (place_row[:, None] < place_column[None, :]))


@triton.jit
def prepare_places(
    size,
    group,
    places,
    BY_REWARD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """How many candidates stand before each, by falling reward or by falling score."""
    for row in range(0, size, ROWS):
        place, present, u, r = load_block(row, size, group, ROWS)
        ahead = tl.zeros((ROWS,), tl.int32)
        for column in range(0, size, COLUMNS):
            other, here, v, s = load_block(column, size, group, COLUMNS)
            if BY_REWARD:
                own, theirs = r[:, None], s[None, :]
            else:
                own, theirs = u[:, None], v[None, :]
            before = (theirs > own) | ((theirs == own) & (other[None, :] < place[:, None]))
            ahead += tl.sum((before & here[None, :]).to(tl.int32), 1)
        tl.store(places + group[0] + place, ahead.to(tl.float32), mask=present)


@triton.jit
def pairwise_rows(
    place,
    present,
    u,
    r,
    size,
    group,
    score_places,
    reward_places,
    margin,
    right,
    wrong,
    low,
    spread,
    best,
    worst,
    PHI: tl.constexpr,
    BEST_WORST: tl.constexpr,
    LAMBDA: tl.constexpr,
    MARGIN_BY: tl.constexpr,
    SMOOTHED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Form A: Σ_{r_i > r_j} w_ij φ(u_i - u_j - m_ij) and g_i = Σ_j w_ij φ' - Σ_j w_ji φ'.

    Of i and j at most one is the better, so φ is evaluated once for both of their gradients.
    """
    loss = tl.zeros((ROWS,), tl.float32)
    grad = tl.zeros((ROWS,), tl.float32)
    if LAMBDA:
        gain = tl.exp2((r - low) / spread) - 1.0
        # LambdaRank's discount 1 / log(1 + τ), τ the rank by the current scores.
        ahead = tl.load(score_places + group[0] + place, mask=present, other=0.0)
        discount = 1.0 / log1p(1.0 + ahead)
    if MARGIN_BY == "rank":
        rank = tl.load(reward_places + group[0] + place, mask=present, other=0.0)
    for column in range(0, size, COLUMNS):
        other, here, v, s = load_block(column, size, group, COLUMNS)
        better = r[:, None] > s[None, :]
        pair = (better | (r[:, None] < s[None, :])) & present[:, None] & here[None, :]
        if BEST_WORST:
            pair = pair & (
                ((place == best)[:, None] & (other == worst)[None, :])
                | ((place == worst)[:, None] & (other == best)[None, :])
            )
        difference = u[:, None] - v[None, :]
        z = tl.where(better, difference, -difference)
        if MARGIN_BY == "reward":
            z -= margin * tl.abs(r[:, None] - s[None, :])
        elif MARGIN_BY == "rank":
            other_rank = tl.load(reward_places + group[0] + other, mask=here, other=0.0)
            z -= margin * tl.abs(rank[:, None] - other_rank[None, :])
        else:
            z -= margin
        if PHI == "hinge":
            value = tl.where(z >= 0.0, 0.0, -z)
            # NaN is neither below nor above zero; its slope has to be NaN, not 0.
            slope = tl.where(z < 0.0, -1.0, tl.where(z >= 0.0, 0.0, z))
        elif PHI == "logistic":
            tail = log1p(tl.exp(-tl.abs(z)))
            value = tl.where(z < 0.0, -z, 0.0) + tail
            slope = -1.0 / (1.0 + tl.exp(z))
            if SMOOTHED:
                value = right * value + wrong * (tl.where(z < 0.0, 0.0, z) + tail)
                slope = right * slope + wrong / (1.0 + tl.exp(-z))
        else:
            value = z * z
            slope = 2.0 * z
        if LAMBDA:
            other_gain = tl.exp2((s - low) / spread) - 1.0
            other_ahead = tl.load(score_places + group[0] + other, mask=here, other=0.0)
            other_discount = 1.0 / log1p(1.0 + other_ahead)
            weight = tl.abs(gain[:, None] - other_gain[None, :])
            weight *= tl.abs(discount[:, None] - other_discount[None, :])
            value *= weight
            slope *= weight
        loss += tl.sum(tl.where(pair & better, value, 0.0), 1)
        grad += tl.sum(tl.where(pair, tl.where(better, slope, -slope), 0.0), 1)
    return loss, grad


@triton.jit
def stage_scale(stage, member, own, itself, REWARD_GAP: tl.constexpr):
    """a_ki as [stage, member] or its transpose: 1, or PRO's r_k - r_i, with a_kk the largest."""
    if REWARD_GAP:
        scale = tl.where(itself, own, stage - member)
    else:
        scale = tl.where(itself, 1.0, 1.0)
    return scale


@triton.jit
def prepare_staged(
    size,
    group,
    scratch,
    count,
    low,
    top_k,
    REWARD_GAP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Log-sum-exp of each stage, +inf for a stage that is skipped; returns the group's loss."""
    loss = tl.zeros((ROWS,), tl.float32)
    for row in range(0, size, ROWS):
        place, present, u, r = load_block(row, size, group, ROWS)
        own = tl.full((ROWS,), 1.0, tl.float32)
        if REWARD_GAP:
            own = r - low
        top = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        behind = tl.zeros((ROWS,), tl.int32)
        for column in range(0, size, COLUMNS):
            other, here, v, s = load_block(column, size, group, COLUMNS)
            after = stands_before(r, s, place, other) & here[None, :]
            itself = place[:, None] == other[None, :]
            a = stage_scale(r[:, None], s[None, :], own[:, None], itself, REWARD_GAP)
            x = tl.where(after | (itself & here[None, :]), a * v[None, :], float("-inf"))
            peak = tl.maximum(top, tl.max(x, 1))
            base = tl.where(peak == float("-inf"), 0.0, peak)
            total = total * tl.exp(top - base) + tl.sum(tl.exp(x - base[:, None]), 1)
            top = peak
            behind += tl.sum(after.to(tl.int32), 1)
        base = tl.where(top == float("-inf"), 0.0, top)
        lse = base + tl.log(tl.where(total == 0.0, 1.0, total))
        active = present & (behind > 0) & (count - 1 - behind < top_k)
        if REWARD_GAP:
            # A stage without a strictly worse candidate is a constant: it has nothing to teach.
            active = active & (own > 0.0)
        loss += tl.where(active, lse - own * u, 0.0)
        # +inf marks a skipped stage; no other can have it: with an infinite score its sum is NaN.
        lse = tl.where(active, lse, float("inf"))
        tl.store(scratch + group[0] + place, lse, mask=place < size)
    return tl.sum(loss, 0)


@triton.jit
def staged_rows(
    place,
    present,
    u,
    r,
    size,
    group,
    scratch,
    low,
    REWARD_GAP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Form B: g_i = Σ_{k before or at i} a_ki (exp(a_ki u_i - lse_k) - [i = k]), rows are i."""
    grad = tl.zeros((ROWS,), tl.float32)
    for column in range(0, size, COLUMNS):
        other, here, v, s = load_block(column, size, group, COLUMNS)
        lse = tl.load(scratch + group[0] + other, mask=here, other=float("inf"))
        itself = place[:, None] == other[None, :]
        stage = (s[None, :] > r[:, None]) | (
            (s[None, :] == r[:, None]) & (other[None, :] <= place[:, None])
        )
        member = stage & present[:, None] & (here & (lse != float("inf")))[None, :]
        own = s - low
        a = stage_scale(s[None, :], r[:, None], own[None, :], itself, REWARD_GAP)
        share = tl.where(itself, -a, 0.0) + a * tl.exp(a * u[:, None] - lse[None, :])
        grad += tl.sum(tl.where(member, share, 0.0), 1)
    return grad


@triton.jit
def prepare_softmax(size, group, temperature, ROWS: tl.constexpr):
    """Log-sum-exp of the scaled scores, and peak and sum of the target distribution's weights."""
    top = float("-inf")
    total = 0.0
    peak = float("-inf")
    mass = 0.0
    for row in range(0, size, ROWS):
        place, present, u, r = load_block(row, size, group, ROWS)
        higher = tl.maximum(top, tl.max(tl.where(present, u, float("-inf")), 0))
        # Equal maxima rescale by 1: before the first candidate both are -inf.
        total *= tl.where(higher == top, 1.0, tl.exp(top - higher))
        total += tl.sum(tl.where(present, tl.exp(u - higher), 0.0), 0)
        top = higher
        q = r / temperature
        higher = tl.maximum(peak, tl.max(tl.where(present, q, float("-inf")), 0))
        mass *= tl.where(higher == peak, 1.0, tl.exp(peak - higher))
        mass += tl.sum(tl.where(present, tl.exp(q - higher), 0.0), 0)
        peak = higher
    return top + tl.log(total), peak, mass


@triton.jit
def softmax_rows(present, u, r, lse, peak, mass, temperature):
    """Form C: -Σ q_i log softmax(u)_i with q = softmax(r / temperature), g = softmax(u) - q."""
    logp = u - lse
    q = tl.exp(r / temperature - peak) / mass
    loss = tl.where(present, -q * logp, 0.0)
    grad = tl.where(present, tl.exp(logp) - q, 0.0)
    return loss, grad


@triton.jit
def expected_terms(present, u, r, lse, peak, mass, temperature, TARGET: tl.constexpr):
    """Share p_i of each candidate in softmax(u), and its value v_i."""
    p = tl.where(present, tl.exp(u - lse), 0.0)
    value = r
    if TARGET == "softmax":
        value = tl.exp(r / temperature - peak) / mass
    return p, tl.where(present, value, 0.0)


@triton.jit
def prepare_expected(
    size, group, lse, peak, mass, temperature, TARGET: tl.constexpr, ROWS: tl.constexpr
):
    """Form D: the expected value Σ p_i v_i, of which the loss is the negative."""
    mean = 0.0
    for row in range(0, size, ROWS):
        place, present, u, r = load_block(row, size, group, ROWS)
        p, value = expected_terms(present, u, r, lse, peak, mass, temperature, TARGET)
        mean += tl.sum(p * value, 0)
    return mean


@triton.jit
def pointwise_rows(present, u, r, count, peak, mass, temperature):
    """Form E: -Σ [q_i log σ(u_i) + log σ(-u_i) / n], g_i = σ(u_i) / n - q_i σ(-u_i)."""
    q = tl.exp(r / temperature - peak) / mass
    share = 1.0 / count.to(tl.float32)
    tail = log1p(tl.exp(-tl.abs(u)))
    loss = q * (tl.where(u < 0.0, -u, 0.0) + tail) + share * (tl.where(u < 0.0, 0.0, u) + tail)
    grad = share / (1.0 + tl.exp(-u)) - q / (1.0 + tl.exp(u))
    return tl.where(present, loss, 0.0), tl.where(present, grad, 0.0)


@triton.jit
def prepare_positions(size, group, scratch, low, spread, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Derivative of the smooth DCG's loss by each smooth place, not yet divided by the ideal DCG;
    returns the smooth and the ideal DCG, both without their common factor log 2."""
    total = 0.0
    ideal = 0.0
    for row in range(0, size, ROWS):
        place, present, u, r = load_block(row, size, group, ROWS)
        smooth = tl.zeros((ROWS,), tl.float32)
        ahead = tl.zeros((ROWS,), tl.int32)
        for column in range(0, size, COLUMNS):
            other, here, v, s = load_block(column, size, group, COLUMNS)
            pair = here[None, :] & (place[:, None] != other[None, :])
            passing = 1.0 / (1.0 + tl.exp(u[:, None] - v[None, :]))
            smooth += tl.sum(tl.where(pair, passing, 0.0), 1)
            before = (s[None, :] > r[:, None]) | (
                (s[None, :] == r[:, None]) & (other[None, :] < place[:, None])
            )
            ahead += tl.sum((before & here[None, :]).to(tl.int32), 1)
        gain = tl.where(present, tl.exp2((r - low) / spread) - 1.0, 0.0)
        log_place = tl.log(2.0 + smooth)
        total += tl.sum(tl.where(present, gain / log_place, 0.0), 0)
        ideal += tl.sum(gain / tl.log(2.0 + ahead.to(tl.float32)), 0)
        weight = gain / ((2.0 + smooth) * log_place * log_place)
        tl.store(scratch + group[0] + place, weight, mask=present)
    return total, ideal


@triton.jit
def positions_rows(
    place, present, u, size, group, scratch, ideal, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Form F: 1 - DCG / ideal with smooth places; g_i = Σ_{j ≠ i} (w_j - w_i) σ'(u_i - u_j)."""
    grad = tl.zeros((ROWS,), tl.float32)
    own = tl.load(scratch + group[0] + place, mask=present & (place < size), other=0.0)
    for column in range(0, size, COLUMNS):
        other, here, v, s = load_block(column, size, group, COLUMNS)
        theirs = tl.load(scratch + group[0] + other, mask=here, other=0.0)
        pair = present[:, None] & here[None, :] & (place[:, None] != other[None, :])
        decay = tl.exp(-tl.abs(u[:, None] - v[None, :]))
        slope = decay / ((1.0 + decay) * (1.0 + decay))
        grad += tl.sum(tl.where(pair, slope * (theirs[None, :] - own[:, None]), 0.0), 1)
    return grad / ideal
