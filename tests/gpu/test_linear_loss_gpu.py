"""The fused loss on a GPU: the contracts of the CPU tests in bf16, fp16 and float32."""

from __future__ import annotations

import pytest
import torch
from plain_linear import ErrorComparison, Problem, largest_error, make_problem

import fastrank
from fastrank.losses import LOSSES

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
ALL = [cls() for cls in LOSSES.values()]
BUDGETS = {"group": {}, "recompute": {"logits_memory": 1531 * 4 * 9}}


def on_gpu(seed: int, dtype: torch.dtype, **variant) -> Problem:
    """A problem whose numbers are representable in ``dtype``, on the GPU."""
    options = {"vocab": 1531, "width": 192, "groups": (4, 1, 0, 7, 2, 8), "longest": 19, **variant}
    return make_problem(seed, **options).on(DEVICE, dtype)


@pytest.fixture(autouse=True)
def _full_float32_products():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("loss", ALL, ids=repr)
def test_float32_equals_float64(loss, budget, frozen) -> None:
    problem = on_gpu(3, torch.float32, frozen_head=frozen)
    got = problem.value_and_gradients(loss, -1.7, **BUDGETS[budget])
    error = problem.float32_error(lambda p: p.exact(loss, -1.7))
    assert largest_error(got, problem.exact(loss, -1.7)) <= error < 2e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("confident", [False, True])
@pytest.mark.parametrize("loss", [fastrank.RRHF(), fastrank.PRO(), fastrank.RankNet()], ids=repr)
def test_narrow_error_is_no_larger_than_plain_pytorch(loss, confident, budget, dtype) -> None:
    errors = ErrorComparison()
    for seed in range(4):
        problem = on_gpu(seed, dtype, softcap=None, bias=False, groups=(4, 3, 8))
        if confident:
            problem.make_confident()
        ours = problem.value_and_gradients(loss, **BUDGETS[budget])[1:]
        plain = torch.autograd.grad(problem.plain(loss).mean(), problem.leaves())
        errors.add(ours, plain, problem.exact(loss)[1:])
    errors.check()


def test_float16_gradients_survive_tiny_coefficients_and_a_grad_scaler() -> None:
    problem = on_gpu(5, torch.float16, softcap=None, groups=(8,) * 16, longest=60)
    want = problem.exact(fastrank.RRHF(), 1.0)[1:]
    for upstream in (1.0, 1024.0):
        got = problem.value_and_gradients(fastrank.RRHF(), upstream)[1:]
        for a, b in zip(got, want, strict=True):
            assert ((a.double() / upstream - b).norm() / b.norm()) < 2e-2


@pytest.mark.parametrize("budget", [None, 1531 * 4 * 9])
def test_token_logprobs(budget) -> None:
    for frozen in (False, True):
        problem = on_gpu(7, torch.float32, frozen_head=frozen)
        got = fastrank.token_logprobs(
            problem.hidden, problem.weight, problem.labels, logits_memory=budget, **problem.head()
        )
        upstream = torch.randn_like(got)
        grads = torch.autograd.grad(got, problem.leaves(), upstream)

        def exact(case: Problem, upstream: torch.Tensor = upstream) -> list[torch.Tensor]:
            logp = case.logprobs()
            return [logp, *torch.autograd.grad(logp, case.leaves(), upstream.double())]

        error = problem.float32_error(exact)
        assert largest_error([got, *grads], exact(problem.to(torch.float64))) <= error < 2e-4


def test_the_same_input_gives_the_same_bits() -> None:
    problem = on_gpu(9, torch.bfloat16)
    runs = [problem.value_and_gradients(fastrank.PRO(), 0.7) for _ in range(3)]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_the_dense_path_does_not_wait_for_the_device() -> None:
    problem = on_gpu(11, torch.bfloat16)
    problem.value_and_gradients(fastrank.PRO(), 1.0)  # compilation and handles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        problem.value_and_gradients(fastrank.PRO(), 1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_offsets_on_the_gpu_are_accepted() -> None:
    problem = on_gpu(13, torch.float32)
    want = problem.value_and_gradients(fastrank.RRHF(), 1.0)
    problem.cu_responses = problem.cu_responses.to(DEVICE)
    problem.cu_groups = problem.cu_groups.to(DEVICE)
    got = problem.value_and_gradients(fastrank.RRHF(), 1.0)
    assert largest_error(got, want) < 1e-6
    problem.cu_groups = problem.cu_groups.clone()
    problem.cu_groups[-1] += 1
    with pytest.raises(ValueError, match="cu_groups must end at"):
        problem.fused(fastrank.RRHF(), validate=True)


def test_a_label_outside_the_vocabulary_is_nan_or_an_error() -> None:
    problem = on_gpu(15, torch.float32)
    problem.labels[4] = 10**9
    out = problem.fused(fastrank.RRHF())
    assert torch.isnan(out.token_logprobs[4]) and torch.isnan(out.loss)
    with pytest.raises(ValueError, match="labels must lie in"):
        problem.fused(fastrank.RRHF(), validate=True)


def test_both_backends_agree() -> None:
    problem = on_gpu(17, torch.float32)
    for loss in ALL:
        a = problem.value_and_gradients(loss, 1.3, backend="triton")
        b = problem.value_and_gradients(loss, 1.3, backend="torch")
        assert largest_error(a, b) <= 2 * problem.float32_error(
            lambda p, loss=loss: p.exact(loss, 1.3)
        )


def test_a_compiled_step_passes_without_a_graph_break() -> None:
    torch.compiler.reset()
    problem = on_gpu(19, torch.float32)

    def step(hidden, weight, bias):
        return fastrank.linear_ranking_loss(
            torch.tanh(hidden), weight, problem.labels, problem.rewards,
            cu_responses=problem.cu_responses, cu_groups=problem.cu_groups, loss=fastrank.RRHF(),
            rows=problem.rows, bias=bias,
        ).loss * 2  # fmt: skip

    leaves = problem.leaves()
    want, got = step(*leaves), torch.compile(step, fullgraph=True)(*leaves)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    for a, b in zip(
        torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_tensors_on_different_devices_are_refused() -> None:
    problem = on_gpu(21, torch.float32)
    problem.labels = problem.labels.cpu()
    with pytest.raises(ValueError, match="labels must be on cuda"):
        problem.fused(fastrank.RRHF())
