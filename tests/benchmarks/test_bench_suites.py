"""Each suite on tiny sizes: every variant that runs here passes its gate and gets a time."""

from __future__ import annotations

import pytest
import torch

from fastrank.benchmarks.counts import count_products
from fastrank.benchmarks.problem import build_problem
from fastrank.benchmarks.results import MISSING, OK
from fastrank.benchmarks.runner import RunPlan, run_workload
from fastrank.benchmarks.workloads import WORKLOADS, resize

CPU = torch.device("cpu")
COMPILED = "torch.compile of plain"
LOSS = {"groups": 2, "candidates": 4, "response": 5, "vocab": 203, "hidden": 24}


def measured(name: str, **sizes: object):
    workload = resize(WORKLOADS[name], **sizes)
    problem = build_problem(workload, CPU)
    names = [v.name for v in problem.variants if v.name != COMPILED]
    plan = RunPlan(seconds=0.0, only=names, memory=False)
    rows = run_workload(workload, CPU, plan, problem=problem)
    return {row.variant: row for row in rows}


LOSS_VARIANTS = ("fastrank", "fastrank.token_logprobs", "plain PyTorch", "published loop")
RANK_VARIANTS = ("fastrank", "plain PyTorch", "published loop")
ATTENTION_VARIANTS = ("fastrank", "fastrank, cpu", "fastrank, segmentwise", "dense mask",
                      "no sharing")  # fmt: skip
STEP_VARIANTS = ("fastrank", "no sharing, padding-free", "dense mask",
                 "padded, responses projected", "published loop")  # fmt: skip
STEP = {"model": "llama-2x32", "prompt": 11}


@pytest.mark.parametrize(
    ("name", "expected", "sizes"),
    [
        *(("K5", LOSS_VARIANTS, {**LOSS, "loss": loss, "dtype": dtype, "prompt": 4})
          for loss, dtype in (("rrhf", "float32"), ("pro", "bfloat16"))),
        ("K2", LOSS_VARIANTS, {**LOSS, "dtype": "float32"}),
        ("R1-64x8", RANK_VARIANTS, {"groups": 5}),
        ("R1-64x8-pro", RANK_VARIANTS, {"groups": 3, "candidates": 4}),
        ("A1-512-cpu", ATTENTION_VARIANTS, {"prompt": 19, "candidates": 3, "response": 7}),
        # Fewer heads of keys than of queries.
        ("A1-256", ATTENTION_VARIANTS,
         {"prompt": 9, "candidates": 2, "response": 5, "dtype": "float32"}),
        *(("S2", STEP_VARIANTS, {**STEP, "groups": 2, "candidates": 3, "response": 6, "loss": loss})
          for loss in ("rrhf", "pro")),
        ("S2", STEP_VARIANTS, {**STEP, "candidates": 4, "response": 16, "dtype": "bfloat16"}),
    ],
)  # fmt: skip
def test_every_variant_that_runs_here_passes_its_gate(name: str, expected, sizes):
    rows = measured(name, **sizes)
    for variant in expected:
        row = rows[variant]
        assert row.status == OK, row.reason
        assert row.median_ms is not None and row.median_ms > 0
        assert row.ratio is not None and row.error is not None
    for variant, row in rows.items():
        assert row.status in (OK, MISSING), (variant, row.reason)
        assert row.reason or row.status == OK
    if name == "K2":
        assert "dweight" not in rows["fastrank"].errors
    if name == "K5":
        assert rows["liger fused CE"].reason == "needs CUDA"


def test_dead_rows_are_dropped_and_left():
    rows = measured("K5-85", **{**LOSS, "groups": 4, "candidates": 6})
    assert rows["fastrank"].status == rows["fastrank, every row"].status == OK
    assert rows["fastrank"].products < rows["fastrank, every row"].products == pytest.approx(3)


@pytest.mark.parametrize(
    ("name", "variant", "expected"),
    [
        ("K5", "plain PyTorch", 3),
        ("K5", "fastrank", 3),
        ("K2", "plain PyTorch", 2),
        ("K2", "fastrank", 2),
    ],
)
def test_products_are_counted(name: str, variant: str, expected: int):
    problem = build_problem(resize(WORKLOADS[name], **LOSS, dtype="float32"), CPU)
    step = next(v for v in problem.variants if v.name == variant).make(problem)
    assert count_products(step, problem.product_flops) == pytest.approx(expected)


def test_no_product_is_not_zero_products():
    assert count_products(lambda: torch.ones(3).sum(), 100) is None


def test_products_in_place_are_counted():
    a, out = torch.ones(4, 4), torch.zeros(4, 4)

    def step() -> None:
        out.addmm_(a, a)
        torch.addmm(out, a, a, out=out)
        torch.mm(a, a)

    assert count_products(step, 2 * 4**3) == pytest.approx(3)


def test_the_same_workload_gives_the_same_inputs():
    workload = resize(WORKLOADS["K5"], **LOSS)
    first, second = build_problem(workload, CPU), build_problem(workload, CPU)
    assert torch.equal(first.hidden, second.hidden) and torch.equal(first.rewards, second.rewards)


def test_scores_lie_far_apart_and_every_row_is_live():
    """No dtype's rounding decides a pair, and nothing is saved by dropping rows."""
    problem = build_problem(resize(WORKLOADS["K5"], **{**LOSS, "response": 64}), CPU)
    logits = problem.hidden.detach() @ problem.weight.detach().t()
    logp = torch.log_softmax(logits, -1).gather(1, problem.labels[:, None])
    scores = logp.view(problem.shape).mean(-1)
    gaps = (scores[:, :, None] - scores[:, None, :]).abs() + torch.eye(4) * 9
    assert gaps.min() > 0.1
    assert torch.equal(scores.argsort(1), problem.rewards.argsort(1, descending=True))
