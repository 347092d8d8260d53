"""One workload, every variant: gate, memory, products, then timing of what passed.

A result that is wrong gets no time, and while fastrank's own is wrong or missing nothing is
compared with it.
"""

from __future__ import annotations

import dataclasses
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import environment, gate, measure, memory, products
from .problem import Floor, Problem, Step, Variant, build
from .workloads import Workload

FASTRANK = "fastrank"
OK, WRONG, FAILED, MISSING = "ok", "wrong", "failed", "not run"


@dataclass
class Row:
    """One variant on one workload: what the CSV holds. Times are of one run, in milliseconds."""

    suite: str
    workload: str
    sizes: str
    device: str
    dtype: str
    tokens: int
    groups: int
    candidates: int
    response: int
    prompt: int
    vocab: int
    hidden: int
    loss: str
    variant: str
    ours: bool
    status: str = OK
    reason: str = ""
    error: float | None = None
    errors: str = ""
    median_ms: float | None = None
    spread: float | None = None
    ratio: float | None = None
    """Median over fastrank's median, in the same run."""
    peak_mib: float | None = None
    saved_mib: float | None = None
    """Step suite on a CPU: what autograd keeps between forward and backward, parameters apart."""
    products: float | None = None
    floor_ms: float | None = None
    """Median of the vendor's products that the workload needs, in the same run."""
    floor_share: float | None = None
    """``floor_ms`` over this median."""
    traffic_ms: float | None = None
    """Bytes that must move besides over the measured copy bandwidth."""
    samples_ms: str = ""
    device_name: str = ""
    threads: str = ""
    versions: str = ""
    commit: str = ""
    date: str = ""

    @property
    def timed(self) -> bool:
        return self.median_ms is not None


def run_workload(
    workload: Workload,
    device: torch.device,
    *,
    seconds: float = 20.0,
    min_rounds: int = 5,
    deadline: float | None = None,
    only: Sequence[str] | None = None,
    with_memory: bool = True,
    with_products: bool = True,
    tick: Callable[[str], None] = lambda what: None,
    problem: Problem | None = None,
) -> list[Row]:
    """Measure a workload.

    Args:
        workload: the sizes.
        device: where.
        seconds: how long the timing rounds go on, about.
        min_rounds: how many rounds there are at least.
        deadline: a time of `time.monotonic` after which no further variant is begun.
        only: names of variants; None for all.
        with_memory: also measure peak memory (on a CPU a process for each variant).
        with_products: also count matrix products (one more run of each variant).
        tick: told what goes on.
        problem: the inputs, where the caller has built them.
    """
    tick("inputs")
    problem = problem or build(workload, device)
    where = environment.describe(device)
    rows: list[Row] = []
    steps: dict[str, Step] = {}
    repeats: dict[str, int] = {}
    for variant in problem.variants():
        if only is not None and variant.name not in only:
            continue
        row = _row(workload, device, variant, where)
        rows.append(row)
        reason = variant.missing(problem)
        if reason is None and deadline is not None and time.monotonic() > deadline:
            reason = "no time left"
        if reason is not None:
            row.status, row.reason = MISSING, reason
            continue
        tick(f"check {variant.name}")
        step = _check(problem, variant, row)
        if step is not None:
            steps[variant.name] = step
            repeats[variant.name] = variant.repeats
    problem.forget_references()
    for row in rows:
        if row.variant in steps:
            tick(f"memory and products of {row.variant}")
            if with_products and problem.product_flops():
                row.products = products.count(steps[row.variant], problem.product_flops())
            if with_memory and problem.has_memory:
                _measure_memory(problem, row, steps[row.variant])
    tick("timing")
    floor = problem.floor()
    timed = dict(steps)
    if floor is not None and steps:
        timed[floor.name] = floor.step
    timings = measure.interleave(
        timed,
        device,
        seconds=seconds,
        min_rounds=min_rounds,
        inner=problem.inner,
        repeats=repeats,
        tick=tick,
    )
    _enter(problem, rows, timings, floor)
    return rows


def _row(workload: Workload, device: torch.device, variant: Variant, where: dict[str, str]) -> Row:
    fields = workload.as_dict()
    known = {f.name for f in dataclasses.fields(Row)}
    columns: dict[str, Any] = {k: v for k, v in {**fields, **where}.items() if k in known}
    return Row(
        **columns,
        workload=workload.name,
        sizes=workload.sizes,
        device=device.type,
        tokens=workload.tokens,
        variant=variant.name,
        ours=variant.ours,
    )


def _check(problem: Problem, variant: Variant, row: Row) -> Step | None:
    """Make the step, run it once and hold it against float64; None if it may not be timed."""
    try:
        step = variant.make(problem)
        outputs = step()
        if variant.present is not None:
            outputs = variant.present(problem, outputs)
        verdict = gate.judge(outputs, problem.reference(variant.target), problem.limit)
    except Exception as error:  # a table says which peers break, and why
        if variant.ours:
            traceback.print_exc()
        row.status, row.reason = FAILED, _one_line(error)
        return None
    row.error = verdict.error
    row.errors = " ".join(f"{name}={value:.2e}" for name, value in verdict.errors.items())
    if verdict.wrong is not None:
        row.status, row.reason = WRONG, verdict.wrong
        return None
    return step


def _measure_memory(problem: Problem, row: Row, step: Step) -> None:
    parameters = problem.parameters()
    if parameters is not None:
        row.saved_mib = memory.saved_for_backward(step, parameters) / 2**20
    if problem.device.type == "cuda":
        peak: int | None = memory.cuda_peak(step, problem.device)
    else:
        peak = memory.cpu_peak(problem.workload, row.variant)
    row.peak_mib = None if peak is None else peak / 2**20


def _enter(
    problem: Problem, rows: list[Row], timings: dict[str, measure.Timing], floor: Floor | None
) -> None:
    """Write the timings into the rows."""
    own = timings.get(FASTRANK)
    traffic = None
    if floor is not None and floor.traffic_bytes and timings:
        traffic = floor.traffic_bytes / measure.copy_bandwidth(problem.device) * 1e3
    for row in rows:
        timing = timings.get(row.variant)
        if timing is None:
            continue
        row.median_ms, row.spread = timing.median, timing.spread
        row.samples_ms = " ".join(f"{value:.5g}" for value in timing.samples)
        if own is not None:
            row.ratio = timing.median / own.median
        if floor is not None:
            row.floor_ms = timings[floor.name].median
            row.floor_share = row.floor_ms / timing.median
            row.traffic_ms = traffic


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"


def own_is_right(rows: Sequence[Row]) -> bool:
    """Whether none of fastrank's own variants is wrong or failed."""
    return not any(row.ours and row.status in (WRONG, FAILED) for row in rows)
