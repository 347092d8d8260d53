"""Every loss written out once more, in plain Python numbers, from the papers' formulas.

Independent on purpose: no code of the library is used, so the two can only agree by being right.
Scores may be numbers of mpmath, whose many digits make a difference quotient a derivative.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import mpmath


def rank_term(name: str, s: Sequence[float], r: Sequence[float], **o: Any) -> float:
    """The ranking term of one group with scores ``s`` and rewards ``r``."""
    n = len(s)
    if n < 2 or max(r) == min(r):
        return 0.0
    return o.get("rank_weight", 1.0) * _FORMS.get(name, _pairwise)(name, s, r, o)


def gradient(name: str, s: Sequence[float], r: Sequence[float], **o: Any) -> list[float]:
    """Derivative of `rank_term` by each score."""
    unit = [[float(i == j) for j in range(len(s))] for i in range(len(s))]
    return [slope(name, s, direction, r, **o) for direction in unit]


def slope(
    name: str, s: Sequence[float], direction: Sequence[float], r: Sequence[float], **o: Any
) -> float:
    """Derivative of `rank_term` along a direction: a central difference in 60 digits."""
    step, ends = mpmath.mpf("1e-25"), []
    with mpmath.workdps(60):
        for h in (step, -step):
            moved = [mpmath.mpf(x) + h * d for x, d in zip(s, direction, strict=True)]
            ends.append(rank_term(name, moved, r, **o))
        return float((ends[0] - ends[1]) / (2 * step))


def sft_weight(name: str, n: int, weight: float) -> float:
    return weight * (n - 1) ** 2 if name == "pro" else weight


def order(r: Sequence[float]) -> list[int]:
    return sorted(range(len(r)), key=lambda i: (-r[i], i))


def _pairwise(name: str, s: Sequence[float], r: Sequence[float], o: dict[str, Any]) -> float:
    beta = o.get("beta", {"dpo": 0.1, "simpo": 2.0}.get(name, 1.0))
    if name in ("ipo", "rebel"):
        beta = 1.0 / o.get("eta", 1.0)
    u = [beta * x for x in s]
    ranking = order(r)
    constant = o.get("gamma", 1.0) if name == "simpo" else o.get("margin", float(name == "slic"))
    epsilon = o.get("label_smoothing", 0.0)
    total = 0.0
    for i in range(len(s)):
        for j in range(len(s)):
            if not r[i] > r[j]:
                continue
            if o.get("pairs") == "best_worst" and (i, j) != (ranking[0], ranking[-1]):
                continue
            d = u[i] - u[j]
            apart = {"reward": r[i] - r[j], "rank": ranking.index(j) - ranking.index(i)}
            margin = constant * apart.get(o.get("margin_by", "constant"), 1.0)
            if name in ("rrhf", "slic"):
                total += max(0.0, margin - d)
            elif name in ("ranknet", "dpo", "simpo"):
                right = _softplus(margin - d)
                flipped = epsilon * _softplus(d - margin) if epsilon else 0.0
                if o.get("robust"):
                    total += ((1 - epsilon) * right - flipped) / (1 - 2 * epsilon)
                else:
                    total += (1 - epsilon) * right + flipped
            elif name == "ipo":
                total += (d - 1 / (2 * o.get("beta", 0.1))) ** 2
            elif name == "rebel":
                total += (d - (r[i] - r[j])) ** 2
            elif name == "lambdarank":
                total += _lambda(i, j, u, r) * _softplus(-d)
            else:
                raise ValueError(name)
    return total


def lambda_weights(u: Sequence[float], r: Sequence[float]) -> list[list[float]]:
    return [[_lambda(i, j, u, r) for j in range(len(u))] for i in range(len(u))]


def _lambda(i: int, j: int, u: Sequence[float], r: Sequence[float]) -> float:
    gain = _gains(r)
    by_score = sorted(range(len(u)), key=lambda k: (-u[k], k))
    rank = {k: place + 1 for place, k in enumerate(by_score)}
    return abs(gain[i] - gain[j]) * abs(1 / math.log(1 + rank[i]) - 1 / math.log(1 + rank[j]))


def _gains(r: Sequence[float]) -> list[float]:
    low, high = min(r), max(r)
    return [2 ** ((x - low) / (high - low)) - 1 for x in r]


def _staged(name: str, s: Sequence[float], r: Sequence[float], o: dict[str, Any]) -> float:
    ranking = order(r)
    beta = o.get("beta", 1.0)
    s, r = [beta * s[i] for i in ranking], [r[i] for i in ranking]
    n, total = len(s), 0.0
    for k in range(min(n - 1, o.get("top_k") or n)):
        if name == "listmle" or o.get("stage_scale") == "one":
            total += _logsumexp(s[k:]) - s[k]
            continue
        own = max(r[k] - r[i] for i in range(k + 1, n))
        if own <= 0:
            continue
        scaled = [own * s[k]] + [(r[k] - r[i]) * s[i] for i in range(k + 1, n)]
        total += _logsumexp(scaled) - scaled[0]
    return total


def _distribution(name: str, s: Sequence[float], r: Sequence[float], o: dict[str, Any]) -> float:
    """ListNet and InfoNCA, NCA, LIRE."""
    n = len(s)
    q = _softmax([x / (o.get("temperature", 1.0) if name != "lire" else 1.0) for x in r])
    if name == "lire":
        p = _softmax([x / o.get("temperature", 2.0) for x in s])
        value = q if o.get("value") == "softmax" else r
        return -sum(pi * vi for pi, vi in zip(p, value, strict=True))
    u = [o.get("beta", 0.01 if name == "nca" else 1.0) * x for x in s]
    if name == "nca":
        return sum(qi * _softplus(-x) + _softplus(x) / n for qi, x in zip(q, u, strict=True))
    total = _logsumexp(u)
    return -sum(qi * (x - total) for qi, x in zip(q, u, strict=True))


def _approx_ndcg(name: str, s: Sequence[float], r: Sequence[float], o: dict[str, Any]) -> float:
    n, gain, ranking = len(s), _gains(r), order(r)
    u = [x / o.get("temperature", 1.0) for x in s]
    total = 0.0
    for i in range(n):
        place = 1 + sum(_exp(-_softplus(u[i] - u[j])) for j in range(n) if j != i)
        total += gain[i] / _log(1 + place) * math.log(2)
    return 1 - total / sum(gain[i] / math.log2(2 + k) for k, i in enumerate(ranking))


def _softplus(x: float) -> float:
    if isinstance(x, mpmath.mpf):
        return mpmath.log(1 + mpmath.exp(x))
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def _exp(x: float) -> float:
    return mpmath.exp(x) if isinstance(x, mpmath.mpf) else math.exp(x)


def _log(x: float) -> float:
    return mpmath.log(x) if isinstance(x, mpmath.mpf) else math.log(x)


def _logsumexp(values: Sequence[float]) -> float:
    top = max(values)
    return top + _log(sum(_exp(v - top) for v in values))


def _softmax(values: Sequence[float]) -> list[float]:
    total = _logsumexp(values)
    return [_exp(v - total) for v in values]


_FORMS = {
    "pro": _staged,
    "listmle": _staged,
    "listnet": _distribution,
    "nca": _distribution,
    "lire": _distribution,
    "approxndcg": _approx_ndcg,
}
