"""pytest-benchmark entry points of the CPU suites, from the same workloads and variants.

    pytest bench/test_cpu.py --benchmark-enable -k "K5 and fastrank"

Each variant passes the float64 gate before it is timed. The recorded tables come from
``fastrank bench``, which lets variants take turns; here each runs by itself.
"""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from fastrank.benchmarks.problem import Problem, build_problem, check, variant_names
from fastrank.benchmarks.workloads import SUITES, WORKLOADS, choose_workloads

CASES = [
    pytest.param(workload.name, variant, id=f"{workload.name}-{variant}")
    for suite in SUITES
    for workload in choose_workloads(suite, "cpu")
    for variant in variant_names(suite)
]


@lru_cache(maxsize=1)  # cases come workload by workload: one set of inputs at a time
def problem_of(workload: str) -> Problem:
    return build_problem(WORKLOADS[workload], torch.device("cpu"))


@pytest.mark.parametrize(("workload", "name"), CASES)
def test_workload(benchmark, workload: str, name: str):
    problem = problem_of(workload)
    variant = next(v for v in problem.variants if v.name == name)
    reason = variant.missing(problem)
    if reason is not None:
        pytest.skip(reason)
    step, verdict = check(problem, variant)
    assert verdict.wrong is None, verdict.wrong
    benchmark.extra_info.update(sizes=problem.workload.sizes, error=verdict.error)
    benchmark.pedantic(step, rounds=5, warmup_rounds=1, iterations=problem.inner)
