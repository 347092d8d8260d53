"""The kernels inside the fused loss: every strategy against a plain computation in float64."""

from __future__ import annotations

import pytest
import torch
from plain_linear import Problem, largest_error, make_problem

pytest.importorskip("triton")

import fastrank  # noqa: E402
from fastrank.losses import LOSSES  # noqa: E402

pytestmark = pytest.mark.usefixtures("approximate")
LOSS_OBJECTS = {name: cls() for name, cls in LOSSES.items()}


@pytest.fixture(autouse=True)
def _full_float32_products():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("loss", LOSS_OBJECTS.values(), ids=LOSS_OBJECTS)
def test_every_loss(device, poisoned, loss) -> None:
    problem = make_problem(3, longest=3).on(device, torch.float32)
    got = problem.value_and_gradients(loss, -1.7, backend="triton")
    error = problem.float32_error(lambda p: p.exact(loss, -1.7))
    assert largest_error(got, problem.exact(loss, -1.7)) <= error < 2e-4


@pytest.mark.parametrize("frozen", [False, True], ids=["head", "frozen head"])
@pytest.mark.parametrize("logits_memory", [None, 97 * 4 * 20, 97 * 4 * 3])
def test_every_strategy(device, logits_memory, frozen) -> None:
    loss = LOSS_OBJECTS["rrhf"]  # the one that leaves rows dead
    problem = make_problem(5, frozen_head=frozen, longest=5).on(device, torch.float32)
    got = problem.value_and_gradients(loss, -1.7, backend="triton", logits_memory=logits_memory)
    error = problem.float32_error(lambda p: p.exact(loss, -1.7))
    assert largest_error(got, problem.exact(loss, -1.7)) <= error < 2e-4


@pytest.mark.parametrize("frozen", [False, True], ids=["head", "frozen head"])
@pytest.mark.parametrize("logits_memory", [None, 97 * 4 * 3])
def test_token_logprobs_for_any_loss(device, logits_memory, frozen) -> None:
    problem = make_problem(7, frozen_head=frozen).on(device, torch.float32)
    got = fastrank.token_logprobs(
        problem.hidden, problem.weight, problem.labels, backend="triton",
        logits_memory=logits_memory, **problem.head(),
    )  # fmt: skip
    upstream = torch.randn_like(got)

    def exact(case: Problem) -> list[torch.Tensor]:
        logp = case.logprobs()
        return [logp, *torch.autograd.grad(logp, case.leaves(), upstream.double())]

    grads = torch.autograd.grad(got, problem.leaves(), upstream)
    error = problem.float32_error(exact)
    assert largest_error([got, *grads], exact(problem.to(torch.float64))) <= error < 2e-4


def test_float64_is_pointed_to_the_backend_that_computes_it(device) -> None:
    problem = make_problem(9).on(device, torch.float32).to(torch.float64)
    with pytest.raises(ValueError, match="float64; backend='torch' computes in float64"):
        problem.fused(LOSS_OBJECTS["rrhf"], backend="triton")


@pytest.mark.parametrize(
    ("name", "frozen", "logits_memory"),
    [("rrhf", False, None), ("pro", False, 97 * 4 * 3), ("dpo", True, 97 * 4 * 3)],
    ids=["group", "recompute", "unit"],
)
def test_a_losing_candidate_of_probability_zero(device, name, frozen, logits_memory) -> None:
    """Its score is -inf and its coefficient exactly 0: values and gradients of the others hold."""
    loss = type(LOSS_OBJECTS[name])(sft_weight=0.5)
    options = {"softcap": None, "frozen_head": frozen, "longest": 3}
    problem = make_problem(11, groups=(4, 3), **options).on(device, torch.float32)
    problem.rewards = torch.tensor([0.5, 1, 0, 2, 1.5, -1, 0], device=device)
    problem.labels[problem.labels == 96] = 95
    problem.labels[problem.cu_responses[[2, 5]].long()] = 96
    with torch.no_grad():
        problem.bias[96] = float("-inf")
    want = problem.exact(loss, -1.7)
    assert all(x.isfinite().all() for x in want)
    got = problem.value_and_gradients(loss, -1.7, backend="triton", logits_memory=logits_memory)
    error = problem.float32_error(lambda p: p.exact(loss, -1.7))
    assert largest_error(got, want) <= error < 2e-4
    apart = problem.fused(loss, backend="triton", logits_memory=logits_memory, reduction="none")
    grads = torch.autograd.grad(-1.7 * apart.loss.mean(), problem.leaves())
    assert largest_error([apart.loss.mean(), *grads], want) <= error
