"""What every backward promises: no silent second order, and no copy of what it hands over."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from plain_linear import Problem, make_problem
from torch import Tensor

import fastrank
import fastrank_kernels
from fastrank_kernels import ops


def ranking(problem: Problem, **options) -> Tensor:
    return problem.fused(fastrank.RRHF(), **options).loss


def logprobs(problem: Problem, **options) -> Tensor:
    return fastrank.token_logprobs(
        problem.hidden, problem.weight, problem.labels, **problem.head(), **options
    ).sum()


def scores(problem: Problem) -> Tensor:
    values = problem.hidden.flatten()[: len(problem.rewards)]
    groups = problem.cu_groups
    return fastrank.ranking_loss(values, problem.rewards, loss=fastrank.IPO(), cu_groups=groups)


def square(problem: Problem) -> Tensor:
    values = problem.hidden[0, : 2 * 6].view(2, 6)
    return fastrank.ranking_loss(values, torch.rand(2, 6), loss=fastrank.RankNet())


LOSSES = {
    "fused": ranking,
    "fused, recomputed": lambda p: ranking(p, logits_memory=128 * 8 * 2),
    "fused, per group": lambda p: ranking(p, reduction="none").sum(),
    "log-probabilities": logprobs,
    "log-probabilities, recomputed": lambda p: logprobs(p, logits_memory=128 * 8 * 2),
    "ranking term of ragged groups": scores,
    "ranking term of equal groups": square,
}


@pytest.mark.parametrize("frozen", [False, True], ids=["head", "frozen head"])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_a_second_order_is_refused_and_never_wrong(loss, frozen) -> None:
    """`create_graph=True` used to give half of the right number, and a Hessian of zeros."""
    problem = make_problem(3, frozen_head=frozen)
    with pytest.raises(RuntimeError, match=r"cannot be differentiated again.*create_graph=True"):
        torch.autograd.grad(loss(problem), problem.hidden, create_graph=True)
    torch.autograd.grad(loss(problem), problem.hidden)


def test_a_hessian_is_refused() -> None:
    rewards, loss = torch.arange(4.0), fastrank.IPO()
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.functional.hessian(
            lambda s: fastrank.ranking_loss(s, rewards, loss=loss), torch.randn(4)
        )


def test_sums_of_segments_are_right_in_every_order() -> None:
    """Their backward is made of operations that autograd knows."""
    values = torch.randn(9, dtype=torch.float64, requires_grad=True)
    offsets = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
    assert torch.autograd.gradgradcheck(
        lambda v: fastrank_kernels.segment_sum(v, offsets).square(), values
    )


class Made(NamedTuple):
    """A gradient as the operator made it; no reference to it, which would make autograd copy."""

    address: int
    value: Tensor


@pytest.fixture
def made(monkeypatch) -> list[Made]:
    found: list[Made] = []
    operator = ops.linear_ranking

    def recorded(**arguments):
        results = operator(**arguments)
        found[:] = [Made(gradient.data_ptr(), gradient.clone()) for gradient in results[4:]]
        return results

    monkeypatch.setattr(ops, "linear_ranking", recorded)
    return found


@pytest.mark.parametrize("factor", [1, 2])
def test_gradients_are_handed_over_without_a_copy(made, factor) -> None:
    problem = make_problem(5, repeat_rows=False).to(torch.float32)
    (factor * ranking(problem)).backward()
    for leaf, gradient in zip(problem.leaves(), made, strict=True):
        assert leaf.grad.data_ptr() == gradient.address
        assert torch.equal(leaf.grad, factor * gradient.value)


def test_a_retained_graph_keeps_its_gradients(made) -> None:
    problem = make_problem(7).to(torch.float32)
    loss = 3 * ranking(problem)
    for _ in range(2):
        grads = torch.autograd.grad(loss, problem.leaves(), retain_graph=True)
        for grad, gradient in zip(grads, made, strict=True):
            assert grad.data_ptr() != gradient.address
            assert torch.equal(grad, 3 * gradient.value)
            grad.zero_()


def test_a_factor_of_narrow_gradients_is_not_rounded(made) -> None:
    """A third in bfloat16 would put every gradient off by the same 0.1 %."""
    problem = make_problem(9, repeat_rows=False).to(torch.bfloat16)
    (ranking(problem) / 3).backward()
    for leaf, gradient in zip(problem.leaves(), made, strict=True):
        expected = gradient.value.float() * torch.tensor(1 / 3)
        assert torch.equal(leaf.grad, expected.bfloat16())
