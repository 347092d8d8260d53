"""``fastrank bench``: the microbenchmarks, beside every peer that runs here.

Each variant is checked against float64 before it is timed; a wrong one is listed without a time.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from fastrank import options as shared
from fastrank.errors import InputError
from fastrank.options.declare import change, check_least, option, options


@options
class BenchOptions(shared.DeviceOptions, shared.OutputOptions, shared.JsonOptions):
    """Microbenchmarks beside every serious peer: time, memory and error."""

    suite: Literal["loss", "rank", "attention", "step"] = option(
        "Operation to measure.", default="loss"
    )
    device: Literal["cpu", "cuda"] | None = change(  # type: ignore[assignment]  # no "auto"
        "Where (default: cuda if there is one).", default=None
    )
    workload: list[str] | None = option(
        "Workloads by name (default: the device's of the suite).", default=None
    )
    variant: list[str] | None = option("Variants by name (default: all).", default=None)
    output: str | None = change("Folder for SUITE_DEVICE.csv and a plot.")
    seconds: float | None = option(
        "Time for the rounds of a workload, about (default: 20, of a shape of your own 5).",
        default=None,
    )
    time_limit: float | None = option(
        "Stop starting peers after this many seconds; the rest is listed (default: none, with a "
        "shape of your own 40).",
        default=None,
    )
    memory: bool = option("Also measure peak memory.", default=True)
    threads: int | None = option("CPU threads (default: torch's).", default=None)


@options
class SizeOptions(
    shared.ShapeOptions, shared.DtypeOptions, shared.LossOptions, shared.ModelOptions
):
    """Your own shape: sizes that replace those of every --workload, or without any make one."""

    tokens: int | None = change("Response tokens in all; sets the number of groups.")
    groups: int | None = option("Prompts.", default=None)
    candidates: int | None = option("Candidates per prompt.", default=None)
    prompt: int | None = option("Tokens of a prompt.", default=None)
    response: int | None = option("Tokens of a response.", default=None)
    hidden: int | None = option("Width of the hidden rows.", default=None)
    dtype: Literal["float32", "bfloat16", "float16"] | None = change(  # type: ignore[assignment]
        "Of inputs and parameters.", default=None
    )
    loss: Literal["rrhf", "pro"] | None = change(  # type: ignore[assignment]
        "Ranking loss.", default=None
    )
    model: str | None = change("Shape of the step suite's model, e.g. llama-6x256.")
    accuracy: float | None = option("Ranking accuracy before the step (0.5: random).", default=None)


def bench(options: BenchOptions, sizes: SizeOptions) -> dict[str, Any]:
    """Measure, print one table per workload, write the CSV; returns the rows."""
    from fastrank.benchmarks.workloads import choose_workloads, resize

    chosen = choose_workloads(options.suite, options.device or _default_device(), options.workload)
    # Sizes alone ask one question, which is to be answered within a minute.
    shaped = options.workload is None and any(value is not None for value in vars(sizes).values())
    if shaped:
        chosen = [replace(chosen[0], name="your shape")]
    workloads = [resize(workload, **vars(sizes)) for workload in chosen]
    if options.seconds is not None and options.seconds < 0:
        raise InputError(f"--seconds must not be negative, got {options.seconds}")
    check_least(options, "--", threads=1)
    output = None if options.output is None else Path(options.output)
    if output is not None and output.exists() and not output.is_dir():
        raise InputError(f"--output must be a folder, got the file {output}")

    import torch

    from fastrank.benchmarks.problem import quick_variants, variant_names
    from fastrank.benchmarks.results import verdict
    from fastrank.benchmarks.runner import RunPlan, run_workloads

    device = torch.device(options.device or _default_device())
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda expected a CUDA device, found none")
    known = variant_names(options.suite)
    for name in options.variant or ():
        if name not in known:
            raise InputError(f"--variant must be one of {', '.join(known)}, got {name}")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    seconds, limit, only = options.seconds, options.time_limit, options.variant
    if shaped:
        seconds = 5.0 if seconds is None else seconds
        limit = 40.0 if limit is None else limit
        only = quick_variants(options.suite) if only is None else only
    plan = RunPlan(
        seconds=20.0 if seconds is None else seconds,
        min_rounds=3 if shaped else 5,
        only=only,
        memory=options.memory,
        products=not shaped,
        deadline=None if limit is None else time.monotonic() + limit,
    )
    csv = None if output is None else output / f"{options.suite}_{device.type}.csv"
    rows = run_workloads([(workload, plan) for workload in workloads], device, csv)
    found = [verdict([row for row in rows if row.workload == w.name]) for w in workloads]
    return {"rows": rows, "verdicts": found}


def own_failed(result: dict[str, Any]) -> bool:
    """Whether one of fastrank's own variants is wrong or failed."""
    from fastrank.benchmarks.results import own_is_right

    return not own_is_right(result["rows"])


def _default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
