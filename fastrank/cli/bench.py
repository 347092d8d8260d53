"""``fastrank bench``: the microbenchmarks, beside every peer that runs here.

Each variant is checked against float64 before it is timed; a wrong one is listed without a time.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fastrank.cli.parser import parse
from fastrank.errors import InputError


@dataclass
class BenchOptions:
    """Options of ``fastrank bench``."""

    suite: Literal["loss", "rank", "attention", "step"] = field(
        default="loss", metadata={"help": "What is measured."}
    )
    device: Literal["cpu", "cuda"] | None = field(
        default=None, metadata={"help": "Where (default: cuda if there is one)."}
    )
    workload: list[str] | None = field(
        default=None, metadata={"help": "Workloads by name (default: the device's of the suite)."}
    )
    variant: list[str] | None = field(
        default=None, metadata={"help": "Variants by name (default: all)."}
    )
    output: str | None = field(
        default=None, metadata={"help": "Folder for SUITE_DEVICE.csv and a plot."}
    )
    seconds: float = field(
        default=20.0, metadata={"help": "Time for the rounds of a workload, about."}
    )
    time_limit: float | None = field(
        default=None,
        metadata={"help": "Seconds after which no further variant is begun; the rest is listed."},
    )
    memory: bool = field(default=True, metadata={"help": "Also measure peak memory."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads (default: torch's)."})
    json: bool = field(default=False, metadata={"help": "End with one JSON object of all rows."})


@dataclass
class SizeOptions:
    """Sizes that replace those of every chosen workload."""

    tokens: int | None = field(
        default=None, metadata={"help": "Response tokens in all; sets the number of groups."}
    )
    groups: int | None = field(default=None, metadata={"help": "Prompts."})
    candidates: int | None = field(default=None, metadata={"help": "Candidates of a prompt."})
    prompt: int | None = field(default=None, metadata={"help": "Tokens of a prompt."})
    response: int | None = field(default=None, metadata={"help": "Tokens of a response."})
    vocab: int | None = field(default=None, metadata={"help": "Vocabulary entries."})
    hidden: int | None = field(default=None, metadata={"help": "Width of the hidden rows."})
    dtype: Literal["float32", "bfloat16", "float16"] | None = field(
        default=None, metadata={"help": "Of inputs and parameters."}
    )
    loss: Literal["rrhf", "pro"] | None = field(default=None, metadata={"help": "Ranking loss."})
    model: str | None = field(
        default=None, metadata={"help": "Shape of the step suite's model, e.g. llama-6x256."}
    )
    accuracy: float | None = field(
        default=None, metadata={"help": "Ranking accuracy before the step (0.5: random)."}
    )


def run(argv: Sequence[str]) -> int:
    """Run the command; 1 if fastrank's own results are wrong."""
    options, sizes = parse(
        (BenchOptions, SizeOptions),
        argv,
        prog="fastrank bench",
        description="Microbenchmarks beside every serious peer: time, memory and error.",
    )
    return bench(options, vars(sizes))


def bench(options: BenchOptions, sizes: dict[str, Any]) -> int:
    """Measure, print a table per workload, write the CSV."""
    from fastrank.benchmarks.workloads import choose_workloads, resize

    names = choose_workloads(options.suite, options.device or _default_device(), options.workload)
    workloads = [resize(workload, **sizes) for workload in names]
    if options.seconds < 0:
        raise InputError(f"--seconds must not be negative, got {options.seconds}")
    if options.threads is not None and options.threads < 1:
        raise InputError(f"--threads must be at least 1, got {options.threads}")
    output = None if options.output is None else Path(options.output)
    if output is not None and output.exists() and not output.is_dir():
        raise InputError(f"--output must be a folder, got the file {output}")

    import torch

    from fastrank.benchmarks.problem import variant_names
    from fastrank.benchmarks.results import own_is_right
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
    limit = options.time_limit
    plan = RunPlan(
        seconds=options.seconds,
        only=options.variant,
        memory=options.memory,
        deadline=None if limit is None else time.monotonic() + limit,
    )
    csv = None if output is None else output / f"{options.suite}_{device.type}.csv"
    rows = run_workloads([(workload, plan) for workload in workloads], device, csv)
    if options.json:
        from fastrank.cli.options import print_json

        print_json({"rows": [vars(row) for row in rows]})
    return 0 if own_is_right(rows) else 1


def _default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
