"""The goals that the project set itself, each held against rows of a run.

A goal whose rows are not there is not met and not missed: it was not measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastrank.benchmarks.loss_peers import HOLDS_ALL_LOGITS
from fastrank.benchmarks.runner import FASTRANK, OK, Row


@dataclass(frozen=True)
class Goal:
    """``value`` of a workload's rows is to be at most (or at least) ``limit``."""

    workload: str
    what: str
    at_most: bool
    limit: float
    value: Callable[[dict[str, Row]], float | None]

    def check(self, rows: Sequence[Row]) -> tuple[float | None, bool | None]:
        """The value and whether it meets the goal; None where it was not measured."""
        found = {r.variant: r for r in rows if r.workload == self.workload and r.status == OK}
        value = self.value(found) if FASTRANK in found and found[FASTRANK].timed else None
        if value is None:
            return None, None
        return value, value <= self.limit if self.at_most else value >= self.limit


Value = Callable[[dict[str, Row]], "float | None"]


def ratio(variant: str) -> Value:
    """Time of a variant over fastrank's."""
    return lambda rows: rows[variant].ratio if variant in rows else None


def over_floor(rows: dict[str, Row]) -> float | None:
    """fastrank's time over the floor's."""
    share = rows[FASTRANK].floor_share
    return None if share is None else 1 / share


def over_floor_and_traffic(rows: dict[str, Row]) -> float | None:
    """fastrank's time over the floor's and that of the bytes that must move besides."""
    own = rows[FASTRANK]
    if own.floor_ms is None or own.traffic_ms is None or own.median_ms is None:
        return None
    return own.median_ms / (own.floor_ms + own.traffic_ms)


def fastest_streaming_peer(rows: dict[str, Row]) -> float | None:
    """Time over fastrank's of the fastest peer that never holds all logits."""
    ratios = [
        row.ratio
        for name, row in rows.items()
        if not row.ours and name not in HOLDS_ALL_LOGITS and row.ratio is not None
    ]
    return min(ratios, default=None)


def over_fastest(rows: dict[str, Row]) -> float | None:
    """fastrank's time over that of the fastest variant of all."""
    ratios = [row.ratio for row in rows.values() if row.ratio is not None]
    return 1 / min(ratios) if ratios else None


def share(variant: str, field: str) -> Value:
    """fastrank's ``field`` over a variant's."""

    def value(rows: dict[str, Row]) -> float | None:
        if variant not in rows:
            return None
        own, other = getattr(rows[FASTRANK], field), getattr(rows[variant], field)
        return own / other if own is not None and other else None

    return value


def microseconds(variant: str) -> Value:
    """A variant's time."""

    def value(rows: dict[str, Row]) -> float | None:
        found = rows[variant].median_ms if variant in rows else None
        return None if found is None else 1000 * found

    return value


PLAIN, COMPILED, LOOP = "plain PyTorch", "torch.compile of plain", "published loop"
TORCH, TRL, PADDED = "F.linear_cross_entropy", "TRL ChunkedLogProb", "padded, responses projected"

CPU_GOALS = [
    Goal("K5", "plain PyTorch over fastrank", False, 1.0, ratio(PLAIN)),
    Goal("K5", "F.linear_cross_entropy over fastrank", False, 1.7, ratio(TORCH)),
    Goal("K5", "peak memory, of plain PyTorch's", True, 1 / 3, share(PLAIN, "peak_mib")),
    Goal("K5-bf16", "plain PyTorch over fastrank", False, 1.3, ratio(PLAIN)),
    Goal("K5-bf16", "peak memory, of plain PyTorch's", True, 0.25, share(PLAIN, "peak_mib")),
    Goal("K5-85", "keeping dead rows over dropping them", False, 1.0, ratio("fastrank, every row")),
    Goal("S2", "published loop over fastrank", False, 3.5, ratio(LOOP)),
    Goal("S2", "padded, responses projected, over fastrank", False, 2.5, ratio(PADDED)),
    Goal("S2", "saved activations, of the published loop's", True, 0.45, share(LOOP, "saved_mib")),
    Goal("S2-1024", "published loop over fastrank", False, 4.5, ratio(LOOP)),
    Goal("S2-1024", "padded, responses projected, over fastrank", False, 3.3, ratio(PADDED)),
    Goal("S2-256", "published loop over fastrank", False, 1.0, ratio(LOOP)),
    Goal("S2-256", "padded, responses projected, over fastrank", False, 1.0, ratio(PADDED)),
]

GPU_GOALS = [
    Goal("K1", "fastrank over the floor", True, 1.15, over_floor),
    Goal("K1", "fastest streaming peer over fastrank", False, 1.2, fastest_streaming_peer),
    Goal("K1", "torch.compile of plain over fastrank", False, 1.0, ratio(COMPILED)),
    Goal("K1", "TRL over fastrank", False, 1.7, ratio(TRL)),
    Goal("K2", "fastrank over the floor", True, 1.2, over_floor),
    Goal("K2", "fastest streaming peer over fastrank", False, 1.5, fastest_streaming_peer),
    Goal("K3", "fastrank over the floor", True, 1.2, over_floor),
    Goal("K4", "fastrank over floor and traffic", True, 1.1, over_floor_and_traffic),
    Goal("R1-64x8", "the kernel in a replayed graph, microseconds", True, 10.0,
         microseconds("fastrank kernel, replayed graph")),
    Goal("R1-64x8", "the public call with gradient, microseconds", True, 150.0,
         microseconds(FASTRANK)),
    Goal("R1-64x8", "published loop over fastrank", False, 20.0, ratio(LOOP)),
    *(Goal(name, "fastrank's choice over the fastest", True, 1.2, over_fastest)
      for name in ("A1-2048", "A1-512", "A1-256")),
    *(Goal(name, "published loop over fastrank", False, 3.0, ratio(LOOP))
      for name in ("S1-qwen", "S1-llama")),
    *(Goal(name, "peak memory, of the published loop's", True, 0.4, share(LOOP, "peak_mib"))
      for name in ("S1-qwen", "S1-llama")),
]  # fmt: skip


def table(goals: Sequence[Goal], rows: Sequence[Row]) -> str:
    """Every goal as a line of a Markdown table."""
    lines = ["| workload | goal | limit | measured | |", "| --- | --- | --- | --- | --- |"]
    for goal in goals:
        value, met = goal.check(rows)
        sign = "at most" if goal.at_most else "at least"
        verdict = {None: "not measured", True: "met", False: "**missed**"}[met]
        shown = "" if value is None else f"{value:.3g}"
        lines.append(
            f"| {goal.workload} | {goal.what} | {sign} {goal.limit:.3g} | {shown} | {verdict} |"
        )
    return "\n".join(lines)
