"""Every loss written out once more, in plain Python floats, from the papers' formulas.

Independent on purpose: no code of the library is used, so the two can only agree by being right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def rank_term(name: str, s: Sequence[float], r: Sequence[float], **o: Any) -> float:
    """The ranking term of one group with scores ``s`` and rewards ``r``."""
    n = len(s)
    if n < 2 or max(r) == min(r):
        return 0.0
    if name in ("pro", "listmle"):
        return _staged(name, s, r, o)
    if name == "listnet":
        q = _softmax([x / o.get("temperature", 1.0) for x in r])
        total = _logsumexp(s)
        return -sum(qi * (si - total) for qi, si in zip(q, s, strict=True))
    return _pairwise(name, s, r, o)


def sft_weight(name: str, n: int, weight: float) -> float:
    return weight * (n - 1) ** 2 if name == "pro" else weight


def order(r: Sequence[float]) -> list[int]:
    return sorted(range(len(r)), key=lambda i: (-r[i], i))


def _pairwise(name: str, s: Sequence[float], r: Sequence[float], o: dict[str, Any]) -> float:
    beta = {"dpo": 0.1, "simpo": 2.0}.get(name, 1.0)
    beta = o.get("beta", beta) if name in ("dpo", "simpo") else 1.0
    u = [beta * x for x in s]
    ranking = order(r)
    total = 0.0
    for i in range(len(s)):
        for j in range(len(s)):
            if not r[i] > r[j]:
                continue
            if o.get("pairs") == "best_worst" and (i, j) != (ranking[0], ranking[-1]):
                continue
            d = u[i] - u[j]
            if name == "rrhf":
                total += max(0.0, o.get("margin", 0.0) - d)
            elif name == "slic":
                total += max(0.0, o.get("margin", 1.0) - d)
            elif name in ("ranknet", "dpo"):
                total += _softplus(-d)
            elif name == "simpo":
                total += _softplus(-(d - o.get("gamma", 1.0)))
            elif name == "ipo":
                total += (d - 1 / (2 * o.get("beta", 0.1))) ** 2
            elif name == "lambdarank":
                total += _lambda(i, j, u, r) * _softplus(-d)
            else:
                raise ValueError(name)
    return total


def lambda_weights(u: Sequence[float], r: Sequence[float]) -> list[list[float]]:
    return [[_lambda(i, j, u, r) for j in range(len(u))] for i in range(len(u))]


def _lambda(i: int, j: int, u: Sequence[float], r: Sequence[float]) -> float:
    low, high = min(r), max(r)
    gain = [2 ** ((x - low) / (high - low)) - 1 for x in r]
    by_score = sorted(range(len(u)), key=lambda k: (-u[k], k))
    rank = {k: place + 1 for place, k in enumerate(by_score)}
    return abs(gain[i] - gain[j]) * abs(1 / math.log(1 + rank[i]) - 1 / math.log(1 + rank[j]))


def _staged(name: str, s: Sequence[float], r: Sequence[float], o: dict[str, Any]) -> float:
    ranking = order(r)
    s, r = [s[i] for i in ranking], [r[i] for i in ranking]
    n, total = len(s), 0.0
    for k in range(n - 1):
        if name == "listmle":
            if o.get("top_k") and k >= o["top_k"]:
                break
            total += _logsumexp(s[k:]) - s[k]
            continue
        own = max(r[k] - r[i] for i in range(k + 1, n))
        if own <= 0:
            continue
        scaled = [own * s[k]] + [(r[k] - r[i]) * s[i] for i in range(k + 1, n)]
        total += _logsumexp(scaled) - scaled[0]
    return total


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def _logsumexp(values: Sequence[float]) -> float:
    top = max(values)
    return top + math.log(sum(math.exp(v - top) for v in values))


def _softmax(values: Sequence[float]) -> list[float]:
    total = _logsumexp(values)
    return [math.exp(v - total) for v in values]
