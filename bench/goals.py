"""The project's goals, each held against recorded rows.

    python -m bench.goals bench/results

A goal whose rows are not there is not met and not missed: it was not measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastrank.benchmarks.loss_peers import HOLDS_ALL_LOGITS
from fastrank.benchmarks.results import FASTRANK, OK, Measurement, markdown_table, read_csv


@dataclass(frozen=True)
class Goal:
    """``value`` of a workload's rows, by variant, is to be at most (or at least) ``limit``."""

    workload: str
    what: str
    sign: Literal["at most", "at least"]
    limit: float
    value: Callable[[dict[str, Measurement]], float | None]

    def check(self, rows: Sequence[Measurement]) -> tuple[float | None, bool | None]:
        """The value and whether it meets the goal; None where it was not measured."""
        found = {r.variant: r for r in rows if r.workload == self.workload and r.status == OK}
        try:
            value = self.value(found) if found[FASTRANK].timed else None
        except (KeyError, TypeError):  # no such variant; a figure of it that is None
            value = None
        if value is None:
            return None, None
        return value, value <= self.limit if self.sign == "at most" else value >= self.limit


PLAIN, COMPILED, LOOP = "plain PyTorch", "torch.compile of plain", "published loop"
CHUNKED, CUT, FLEX = "torch.compile of plain, 4 chunks", "cut-cross-entropy", "FlexAttention"
HOPPER, QUACK = "liger scaled CE, Hopper", "QuACK CE, whole logits"
TORCH, TRL, PADDED = "F.linear_cross_entropy", "TRL ChunkedLogProb", "padded, responses projected"


def slower(workload: str, variant: str, times: float, what: str = "") -> Goal:
    """The variant takes at least so many times as long as fastrank."""
    ratio = f"{what or variant} over fastrank"
    return Goal(workload, ratio, "at least", times, lambda rows: rows[variant].ratio)


def smaller(workload: str, variant: str, field: str, part: float, what: str) -> Goal:
    """fastrank's figure is at most this part of the variant's."""

    def value(rows):
        return getattr(rows[FASTRANK], field) / getattr(rows[variant], field)

    return Goal(workload, what, "at most", part, value)


def _over_floor(rows):
    return 1 / rows[FASTRANK].floor_share


def _over_floor_and_traffic(rows):
    own = rows[FASTRANK]
    return own.median_ms / (own.floor_ms + own.traffic_ms)


def _fastest_streaming_peer(rows):
    """Time over fastrank's of the fastest peer that never holds all logits."""
    peers = [row for row in rows.values() if not row.ours and row.variant not in HOLDS_ALL_LOGITS]
    return min((peer.ratio for peer in peers), default=None)


CPU_GOALS = [
    slower("K5", PLAIN, 1.0),
    slower("K5", TORCH, 1.7),
    smaller("K5", PLAIN, "peak_mib", 1 / 3, "peak memory, of plain PyTorch's"),
    slower("K5-bf16", PLAIN, 1.3),
    smaller("K5-bf16", PLAIN, "peak_mib", 0.25, "peak memory, of plain PyTorch's"),
    slower("K5-85", "fastrank, every row", 1.0, "keeping dead rows"),
    slower("S2", LOOP, 3.5),
    slower("S2", PADDED, 2.5, f"{PADDED},"),
    smaller("S2", LOOP, "saved_mib", 0.45, "saved activations, of the published loop's"),
    slower("S2-1024", LOOP, 4.5),
    slower("S2-1024", PADDED, 3.3, f"{PADDED},"),
    slower("S2-256", LOOP, 1.0),
    slower("S2-256", PADDED, 1.0, f"{PADDED},"),
]

GPU_GOALS = [
    *(Goal(name, "fastrank over the floor", "at most", limit, _over_floor)
      for name, limit in (("K1", 1.08), ("K2", 1.2), ("K3", 1.2))),
    *(Goal(name, "fastest streaming peer over fastrank", "at least", limit, _fastest_streaming_peer)
      for name, limit in (("K1", 1.2), ("K2", 1.5))),
    *(slower("K1", peer, 1.0) for peer in (COMPILED, CHUNKED, CUT, HOPPER, QUACK)),
    slower("K1", TRL, 1.7, "TRL"),
    Goal("K4", "fastrank over floor and traffic", "at most", 1.1, _over_floor_and_traffic),
    Goal("R1-64x8", "the kernel in a replayed graph, microseconds", "at most", 10.0,
         lambda rows: 1000 * rows["fastrank kernel, replayed graph"].median_ms),
    Goal("R1-64x8", "the public call with gradient, microseconds", "at most", 150.0,
         lambda rows: 1000 * rows[FASTRANK].median_ms),
    slower("R1-64x8", LOOP, 20.0),
    *(Goal(name, "fastrank's choice over the fastest", "at most", 1.2,
           lambda rows: 1 / min(row.ratio for row in rows.values()))
      for name in ("A1-2048", "A1-512", "A1-256")),
    *(slower(name, FLEX, 1.0) for name in ("A1-2048", "A1-512", "A1-256")),
    slower("K1-85", "fastrank, every row", 1.0, "keeping dead rows"),
    *(slower(name, LOOP, 3.0) for name in ("S1-qwen", "S1-llama")),
    *(smaller(name, LOOP, "peak_mib", 0.4, "peak memory, of the published loop's")
      for name in ("S1-qwen", "S1-llama")),
]  # fmt: skip


def goals_table(goals: Sequence[Goal], rows: Sequence[Measurement]) -> str:
    """Every goal as a line of a Markdown table."""
    lines = []
    for goal in goals:
        value, met = goal.check(rows)
        verdict = {None: "not measured", True: "met", False: "**missed**"}[met]
        shown = "" if value is None else f"{value:.3g}"
        lines.append((goal.workload, goal.what, f"{goal.sign} {goal.limit:.3g}", shown, verdict))
    return markdown_table(("workload", "goal", "limit", "measured", ""), lines, texts=5)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="folder of recorded CSV files")
    folder = parser.parse_args().folder
    for device, goals in (("cpu", CPU_GOALS), ("cuda", GPU_GOALS)):
        files = sorted(folder.glob(f"*_{device}.csv"))
        rows = [row for file in files for row in read_csv(file, Measurement)]
        print(goals_table(goals, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
