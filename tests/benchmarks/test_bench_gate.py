"""The correctness gate: a wrong result gets no time, and while fastrank's own is wrong nothing is
compared with it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastrank.benchmarks.problem import Outputs, Problem, Step, Variant, judge, relative_error
from fastrank.benchmarks.results import FAILED, MISSING, OK, WRONG, own_is_right, text_table
from fastrank.benchmarks.runner import RunPlan, run_workload
from fastrank.benchmarks.workloads import WORKLOADS

CPU = torch.device("cpu")


class Squares(Problem):
    """A problem of four numbers: the sum of squares and its gradient."""

    has_memory = False

    def __init__(self, variants: list[Variant]) -> None:
        super().__init__(WORKLOADS["R1-64x8"], CPU)
        self.x = torch.tensor([1.0, -2.0, 3.0, 0.5])
        self.variants = variants

    def compute_reference(self, target: str) -> Outputs:
        x = self.x.double()
        return {"loss": x.square().sum(), "dx": 2 * x}


def right(problem: Squares) -> Step:
    return lambda: {"loss": problem.x.square().sum(), "dx": 2 * problem.x}


def wrong(problem: Squares) -> Step:
    """Right value, wrong gradient: one element in four."""
    gradient = 2 * problem.x
    gradient[2] = 0.0
    return lambda: {"loss": problem.x.square().sum(), "dx": gradient}


def broken(problem: Squares) -> Step:
    raise RuntimeError("no such kernel\nand a second line")


def rows_of(*variants: Variant):
    problem = Squares(list(variants))
    return run_workload(problem.workload, CPU, RunPlan(seconds=0.0), problem=problem)


def test_a_wrong_peer_gets_no_time():
    rows = rows_of(
        Variant("fastrank", right, ours=True), Variant("honest", right), Variant("liar", wrong)
    )
    own, honest, liar = rows
    assert (own.status, honest.status, liar.status) == (OK, OK, WRONG)
    assert own.timed and honest.timed and honest.ratio is not None
    assert not liar.timed and liar.ratio is None and liar.samples_ms == ""
    assert "dx is off by" in liar.reason
    text = text_table(rows)
    assert "wrong: liar: dx is off by" in text
    assert not [line for line in text.splitlines() if line.startswith("  liar")]


@pytest.mark.parametrize(
    "variants",
    [
        [Variant("fastrank", wrong, ours=True), Variant("honest", right)],
        [
            Variant("fastrank", right, ours=True),
            Variant("fastrank, otherwise", wrong, ours=True),
            Variant("honest", right),
        ],
    ],
    ids=["the first", "the second"],
)
def test_nothing_is_compared_with_a_wrong_result_of_our_own(variants: list[Variant]):
    rows = rows_of(*variants)
    assert not own_is_right(rows)
    assert all(not row.timed for row in rows if row.status == WRONG)
    if rows[0].status == WRONG:
        assert all(row.ratio is None for row in rows)
    text = text_table(rows)
    assert "time / fastrank's" not in text
    assert "own results are wrong" in text


def test_what_cannot_run_is_listed_with_its_reason():
    rows = rows_of(
        Variant("fastrank", right, ours=True),
        Variant("absent", right, missing=lambda problem: "package x is not installed"),
        Variant("broken", broken),
    )
    assert [row.status for row in rows] == [OK, MISSING, FAILED]
    text = text_table(rows)
    assert "not run: absent: package x is not installed" in text
    assert "failed: broken: RuntimeError: no such kernel" in text
    assert "second line" not in text
    assert own_is_right(rows)


@pytest.mark.parametrize(
    ("value", "expected", "error"),
    [
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]).double(), 0.0),
        (torch.tensor([3.0, 4.0]), torch.tensor([3.0, 5.0]).double(), 1 / math.sqrt(34)),
        (torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 2.0]).double(), math.inf),
        (torch.tensor([1.0]), torch.tensor([1.0, 2.0]).double(), math.inf),
        (torch.tensor([0.5, 0.0]), torch.tensor([0.0, 0.0]).double(), 0.5),
        (torch.tensor([float("inf")]), torch.tensor([1.0]).double(), math.inf),
    ],
)
@pytest.mark.parametrize("chunk", [1, 1 << 26])
def test_relative_error(
    value: Tensor, expected: Tensor, error: float, chunk: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("fastrank.benchmarks.problem._CHUNK", chunk)
    assert relative_error(value, expected) == pytest.approx(error)


def test_an_absent_result_is_wrong():
    reference = {"loss": torch.tensor(1.0).double(), "dx": torch.ones(2).double()}
    verdict = judge({"loss": torch.tensor(1.0)}, reference, 1e-4)
    assert verdict.wrong is not None and "dx" in verdict.wrong
