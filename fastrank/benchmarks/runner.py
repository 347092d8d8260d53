"""One workload, every variant: gate, memory, products, then timing of those that passed.

A wrong result gets no time, and while fastrank's own is wrong or missing nothing is compared with
it.
"""

from __future__ import annotations

import dataclasses
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fastrank.console import Bar, say

from . import peak_memory, timing
from .counts import count_products
from .problem import Floor, Problem, Step, Variant, build_problem, check
from .provenance import provenance
from .results import (
    FAILED,
    FASTRANK,
    MISSING,
    PLAIN,
    WRONG,
    Measurement,
    print_table,
    variant_line,
    write_csv,
)
from .workloads import Workload


@dataclass(frozen=True)
class RunPlan:
    """How a workload is measured."""

    seconds: float = 20.0
    """Approximate time for the rounds of timing."""
    min_rounds: int = 5
    only: Sequence[str] | None = None
    """Names of variants; None for all."""
    memory: bool = True
    """Also measure peak memory (on a CPU in one process per variant)."""
    products: bool = True
    """Also count matrix products (one more run of each variant)."""
    deadline: float | None = None
    """A time of `time.monotonic` after which no peer is started; fastrank's own always are."""


def run_workloads(
    plans: Iterable[tuple[Workload, RunPlan]], device: torch.device, csv: Path | None = None
) -> list[Measurement]:
    """Measure workloads: a bar on stderr; on stdout a line per variant when it has been checked and
    its memory measured, and a table per workload.

    The CSV file is written after every workload: a long run that is stopped keeps its rows.
    """
    rows: list[Measurement] = []
    todo = list(plans)
    with Bar(desc="inputs", total=len(todo), unit="workloads") as bar:
        for workload, plan in todo:

            def tick(what: str, name: str = workload.name) -> None:
                bar.describe(f"{name}: {what}")

            measured = run_workload(workload, device, plan, tick=tick, say=say)
            rows += measured
            bar.update()
            print_table(measured)
            if csv is not None:
                csv.parent.mkdir(parents=True, exist_ok=True)
                write_csv(rows, csv)
    return rows


def run_workload(
    workload: Workload,
    device: torch.device,
    plan: RunPlan = RunPlan(),
    *,
    tick: Callable[[str], None] = lambda what: None,
    say: Callable[[str], None] = lambda line: None,
    problem: Problem | None = None,
) -> list[Measurement]:
    """Measure a workload.

    Args:
        workload: the sizes.
        device: where.
        plan: how.
        tick: progress callback.
        say: called with a line for every variant that is done with, but for its time.
        problem: the inputs, where the caller has built them.
    """
    tick("inputs")
    problem = problem or build_problem(workload, device)
    where = provenance(device)
    rows: list[Measurement] = []
    steps: dict[str, Step] = {}
    repeats: dict[str, int] = {}
    for variant in problem.variants:
        if plan.only is not None and variant.name not in plan.only:
            continue
        row = _empty_row(workload, device, variant, where)
        rows.append(row)
        reason = variant.missing(problem)
        late = plan.deadline is not None and time.monotonic() > plan.deadline
        if reason is None and late and not variant.ours:
            reason = "no time left"
        if reason is not None:
            row.status, row.reason = MISSING, reason
            continue
        tick(f"check {variant.name}")
        step = _checked(problem, variant, row)
        if step is not None:
            steps[variant.name] = step
            repeats[variant.name] = variant.repeats
    problem.forget_references()
    for row in rows:
        late = plan.deadline is not None and time.monotonic() > plan.deadline
        if row.variant in steps and (row.ours or row.variant in PLAIN or not late):
            tick(f"memory and products of {row.variant}")
            if plan.products and problem.product_flops:
                row.products = count_products(steps[row.variant], problem.product_flops)
            if plan.memory and problem.has_memory:
                _measure_memory(problem, row, steps[row.variant])
        if row.status != MISSING:
            say(variant_line(row))
    tick("timing")
    floor = problem.floor()
    timed = dict(steps)
    if floor is not None and steps:
        timed[floor.name] = floor.step
    timings = timing.interleave(
        timed,
        device,
        seconds=plan.seconds,
        min_rounds=plan.min_rounds,
        inner=problem.inner,
        repeats=repeats,
        tick=tick,
    )
    _enter(rows, timings, floor, device)
    if device.type == "cuda":
        _enter_queued(rows, steps, problem, plan, repeats)
    return rows


def _enter_queued(
    rows: Sequence[Measurement],
    steps: dict[str, Step],
    problem: Problem,
    plan: RunPlan,
    repeats: dict[str, int],
) -> None:
    """The times of fastrank's own variants while the device has still other work."""
    own = {row.variant: steps[row.variant] for row in rows if row.ours and row.variant in steps}
    timings = timing.interleave(
        own,
        problem.device,
        seconds=plan.seconds / 4,
        min_rounds=plan.min_rounds,
        inner=problem.inner,
        repeats=repeats,
        queued=True,
    )
    for row in rows:
        if row.variant in timings:
            row.queued_ms = timings[row.variant].median


def _empty_row(
    workload: Workload, device: torch.device, variant: Variant, where: dict[str, str]
) -> Measurement:
    known = {field.name for field in dataclasses.fields(Measurement)}
    sizes = {k: v for k, v in dataclasses.asdict(workload).items() if k in known}
    return Measurement(
        **sizes | where,
        workload=workload.name,
        sizes=workload.sizes,
        device=device.type,
        tokens=workload.tokens,
        variant=variant.name,
        ours=variant.ours,
    )


def _checked(problem: Problem, variant: Variant, row: Measurement) -> Step | None:
    """The step, checked and its errors entered; None if it may not be timed."""
    try:
        step, verdict = check(problem, variant)
    except Exception as error:  # a table says which peers break, and why
        if variant.ours:
            traceback.print_exc()
        first = (str(error).strip().splitlines() or [""])[0]
        row.status, row.reason = FAILED, f"{type(error).__name__}: {first[:160]}"
        return None
    row.error = verdict.error
    row.errors = " ".join(f"{name}={value:.2e}" for name, value in verdict.errors.items())
    if verdict.wrong is not None:
        row.status, row.reason = WRONG, verdict.wrong
        return None
    return step


def _measure_memory(problem: Problem, row: Measurement, step: Step) -> None:
    parameters = problem.parameters()
    if parameters is not None:
        row.saved_mib = peak_memory.saved_for_backward(step, parameters) / 2**20
    if problem.device.type == "cuda":
        peak: int | None = peak_memory.cuda_peak(step, problem.device)
    else:
        peak = peak_memory.fresh_process_peak(
            "fastrank.benchmarks.problem:make_step",
            workload=dataclasses.asdict(problem.workload),
            variant=row.variant,
        )
    row.peak_mib = None if peak is None else peak / 2**20


def _enter(
    rows: Sequence[Measurement],
    timings: dict[str, timing.Timing],
    floor: Floor | None,
    device: torch.device,
) -> None:
    """Enter the timings into the rows."""
    own = timings.get(FASTRANK)
    traffic = None
    if floor is not None and floor.traffic_bytes and timings:
        traffic = floor.traffic_bytes / timing.copy_bandwidth(device) * 1e3
    for row in rows:
        found = timings.get(row.variant)
        if found is None:
            continue
        row.median_ms, row.spread = found.median, found.spread
        row.samples_ms = " ".join(f"{value:.5g}" for value in found.samples)
        if own is not None:
            row.ratio = found.median / own.median
        if floor is not None:
            row.floor_ms = timings[floor.name].median
            row.floor_share = row.floor_ms / found.median
            row.traffic_ms = traffic
