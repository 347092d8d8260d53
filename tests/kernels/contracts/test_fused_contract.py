"""The kernels inside the fused loss: every strategy against a plain computation in float64."""

from __future__ import annotations

import pytest
import torch
from plain_linear import Problem, largest_error, make_problem

pytest.importorskip("triton")

import fastrank  # noqa: E402
from fastrank.losses import LOSSES  # noqa: E402

LOSS_OBJECTS = {name: cls() for name, cls in LOSSES.items()}


def problem_on(device: torch.device, seed: int, **variant) -> Problem:
    problem = make_problem(seed, **variant).to(torch.float32)
    for name in ("hidden", "weight", "bias", "labels", "rows", "rewards", "reference_scores"):
        tensor = getattr(problem, name)
        if tensor is not None:
            moved = tensor.detach().to(device).requires_grad_(tensor.requires_grad)
            setattr(problem, name, moved)
    problem.reference_scores = problem.reference_scores.float()
    return problem


def value_and_gradients(problem: Problem, loss, **options) -> list[torch.Tensor]:
    out = problem.fused(loss, **options)
    return [out.loss, *torch.autograd.grad(-1.7 * out.loss, problem.leaves())]


def exact(problem: Problem, loss) -> list[torch.Tensor]:
    wide = problem.to(torch.float64)
    wide.reference_scores = problem.reference_scores.double()
    total = wide.plain(loss).mean()
    return [total, *torch.autograd.grad(-1.7 * total, wide.leaves())]


@pytest.fixture(autouse=True)
def _full_float32_products():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("loss", LOSS_OBJECTS.values(), ids=LOSS_OBJECTS)
def test_every_loss(device, poisoned, loss) -> None:
    problem = problem_on(device, 3)
    got = value_and_gradients(problem, loss, backend="triton")
    assert largest_error(got, exact(problem, loss)) < 1e-5


@pytest.mark.parametrize("frozen", [False, True], ids=["head", "frozen head"])
@pytest.mark.parametrize("logits_memory", [None, 97 * 4 * 40, 97 * 4 * 3])
def test_every_strategy(device, logits_memory, frozen) -> None:
    loss = LOSS_OBJECTS["rrhf"]  # the one that leaves rows dead
    problem = problem_on(device, 5, frozen_head=frozen, longest=10)
    got = value_and_gradients(problem, loss, backend="triton", logits_memory=logits_memory)
    assert largest_error(got, exact(problem, loss)) < 1e-5


@pytest.mark.parametrize("frozen", [False, True], ids=["head", "frozen head"])
@pytest.mark.parametrize("logits_memory", [None, 97 * 4 * 3])
def test_token_logprobs_for_any_loss(device, logits_memory, frozen) -> None:
    problem = problem_on(device, 7, frozen_head=frozen)
    got = fastrank.token_logprobs(
        problem.hidden, problem.weight, problem.labels, backend="triton",
        logits_memory=logits_memory, **problem.head(),
    )  # fmt: skip
    upstream = torch.randn_like(got)
    wide = problem.to(torch.float64)
    expected = wide.logprobs()
    grads = torch.autograd.grad(got, problem.leaves(), upstream)
    want = torch.autograd.grad(expected, wide.leaves(), upstream.double())
    assert largest_error([got, *grads], [expected, *want]) < 1e-5


def test_float64_is_pointed_to_the_backend_that_computes_it(device) -> None:
    problem = problem_on(device, 9).to(torch.float64)
    with pytest.raises(ValueError, match="float64; backend='torch' computes in float64"):
        problem.fused(LOSS_OBJECTS["rrhf"], backend="triton")


@pytest.mark.parametrize("logits_memory", [None, 97 * 4 * 3])
@pytest.mark.parametrize("frozen", [False, True], ids=["head", "frozen head"])
@pytest.mark.parametrize("name", ["rrhf", "pro", "dpo"])
def test_a_losing_candidate_of_probability_zero(device, name, frozen, logits_memory) -> None:
    """Its score is -inf and its coefficient exactly 0: values and gradients of the others hold."""
    loss = type(LOSS_OBJECTS[name])(sft_weight=0.5)
    problem = problem_on(device, 11, groups=(4, 3), softcap=None, frozen_head=frozen)
    problem.rewards = torch.tensor([0.5, 1, 0, 2, 1.5, -1, 0], device=device)
    problem.labels[problem.labels == 96] = 95
    problem.labels[problem.cu_responses[[2, 5]].long()] = 96
    with torch.no_grad():
        problem.bias[96] = float("-inf")
    want = exact(problem, loss)
    assert all(x.isfinite().all() for x in want)
    got = value_and_gradients(problem, loss, backend="triton", logits_memory=logits_memory)
    assert largest_error(got, want) < 1e-5
    apart = problem.fused(loss, backend="triton", logits_memory=logits_memory, reduction="none")
    grads = torch.autograd.grad(-1.7 * apart.loss.mean(), problem.leaves())
    assert largest_error([apart.loss.mean(), *grads], want) < 1e-5
