"""The fused losses in bfloat16 and float16 on the kernels, with a GPU's float32 logits.

The interpreter's CPU does not write products of narrow matrices in float32; here it does, as the
vendor's libraries do, so that every branch is the one a GPU takes.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from plain_linear import Problem, make_problem
from torch import Tensor

pytest.importorskip("triton")

import fastrank  # noqa: E402
from fastrank.losses import LOSSES  # noqa: E402
from fastrank_kernels import autograd, dispatch, dropping, products, projection  # noqa: E402
from fastrank_kernels.planner import row_pitch  # noqa: E402

VOCAB = 97


@pytest.fixture(autouse=True)
def wide_products(device, monkeypatch) -> Iterator[None]:
    if device.type == "cuda":
        yield
        return
    library = torch.library.Library("aten", "IMPL", "CPU")

    @torch.autocast("cpu", enabled=False)
    def mm(left: Tensor, right: Tensor, dtype: torch.dtype, *, out: Tensor) -> Tensor:
        return out.copy_(left.to(dtype) @ right.to(dtype))

    @torch.autocast("cpu", enabled=False)
    def addmm(total, left, right, dtype, *, beta=1, alpha=1, out) -> Tensor:
        assert out.data_ptr() == total.data_ptr() and beta == alpha == 1
        return out.add_(left.to(dtype) @ right.to(dtype))

    library.impl("mm.dtype_out", mm)
    library.impl("addmm.dtype_out", addmm)
    for module in (products, projection):
        monkeypatch.setattr(module, "writes_wide", lambda device: True)
    # What is asked for by device: the factor from above is applied by the kernel too.
    monkeypatch.setattr(
        autograd,
        "backend_module",
        lambda _, device, dtype: dispatch.backend_module(
            None if dtype == torch.float64 else "triton", device, dtype
        ),
    )
    yield
    library._destroy()


def narrow_problem(device, seed: int, dtype: torch.dtype, **variant) -> Problem:
    """Hidden rows and head in ``dtype``; every third label is one that its row is certain of."""
    problem = make_problem(seed, **variant)
    rows = problem.hidden if problem.rows is None else problem.hidden[problem.rows]
    logits = rows.detach() @ problem.weight.detach().t()
    problem.labels[::3] = logits.argmax(1)[::3]
    problem = problem.to(dtype)
    for name in ("hidden", "weight", "bias", "labels", "rows", "rewards", "reference_scores"):
        tensor = getattr(problem, name)
        if tensor is not None:
            moved = tensor.detach().to(device).requires_grad_(tensor.requires_grad)
            setattr(problem, name, moved)
    return problem


def errors(got: list[Tensor], want: list[Tensor]) -> list[float]:
    """Relative error of each gradient."""
    return [
        float((a.double() - b).norm() / b.norm().clamp_min(1e-30))
        for a, b in zip(got, want, strict=True)
    ]


def assert_no_worse_than_plain(problem: Problem, grads, plain, exact) -> None:
    """Plain PyTorch in the same dtype has narrow logits before its softmax. Where those are exact
    by chance, what remains is up to three roundings of a gradient: a row's, its coefficient's, and
    that of the factor from above."""
    rounding = 1.5 * {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[problem.hidden.dtype]
    for ours, theirs in zip(errors(grads, exact), errors(plain, exact), strict=True):
        assert ours <= max(theirs, rounding), (ours, theirs)


def check_ranking(problem: Problem, loss, **options) -> None:
    out = problem.fused(loss, backend="triton", **options)
    grads = torch.autograd.grad(-1.7 * out.loss, problem.leaves())
    plain = torch.autograd.grad(-1.7 * problem.plain(loss).mean(), problem.leaves())
    wide = problem.to(torch.float64)
    total = wide.plain(loss).mean()
    exact = torch.autograd.grad(-1.7 * total, wide.leaves())
    torch.testing.assert_close(out.loss.double(), total, rtol=1e-5, atol=1e-5)
    assert_no_worse_than_plain(problem, grads, plain, exact)


def check_logprobs(problem: Problem, **options) -> None:
    got = fastrank.token_logprobs(
        problem.hidden,
        problem.weight,
        problem.labels,
        backend="triton",
        **problem.head(),
        **options,
    )
    upstream = torch.randn_like(got)
    grads = torch.autograd.grad(got, problem.leaves(), upstream, retain_graph=True)
    again = torch.autograd.grad(got, problem.leaves(), upstream)
    assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))
    plain = torch.autograd.grad(problem.logprobs(), problem.leaves(), upstream)
    wide = problem.to(torch.float64)
    exact = torch.autograd.grad(wide.logprobs(), wide.leaves(), upstream.double())
    assert_no_worse_than_plain(problem, grads, plain, exact)


# Rows of logits that fit: all, some groups, or less than a group.
BUDGETS = {"at once": None, "in groups": 128 * 4 * 45, "in parts": 128 * 4 * 3}


@pytest.mark.parametrize("frozen", [False, True], ids=["head", "frozen head"])
@pytest.mark.parametrize("logits_memory", BUDGETS.values(), ids=BUDGETS)
def test_every_strategy(device, logits_memory, frozen) -> None:
    dtype = torch.float16 if logits_memory == BUDGETS["in groups"] and frozen else torch.bfloat16
    problem = narrow_problem(device, 5, dtype, frozen_head=frozen, longest=10, vocab=VOCAB)
    check_ranking(problem, fastrank.ListMLE(sft_weight=1.0), logits_memory=logits_memory)
    check_logprobs(problem, logits_memory=logits_memory)


def widen_head(problem: Problem) -> None:
    """Head and bias in float32, as autocast leaves them to be cast."""
    for name in ("weight", "bias"):
        if (tensor := getattr(problem, name)) is not None:
            wide = tensor.detach().float().requires_grad_(tensor.requires_grad)
            setattr(problem, name, wide)


@pytest.mark.parametrize("logits_memory", BUDGETS.values(), ids=BUDGETS)
def test_a_float32_head_under_autocast(device, logits_memory) -> None:
    """Its gradient comes out of the products in float32 and is not rounded after them."""
    problem = narrow_problem(device, 6, torch.bfloat16, longest=10, vocab=VOCAB)
    widen_head(problem)
    with torch.autocast(device.type, torch.bfloat16):
        check_ranking(problem, fastrank.PRO(), logits_memory=logits_memory)
        check_logprobs(problem, logits_memory=logits_memory)
        out = problem.fused(fastrank.PRO(), backend="triton", logits_memory=logits_memory)
    grads = torch.autograd.grad(out.loss, problem.leaves())
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32, torch.float32]
    for grad in grads[1:]:
        assert ((grad != grad.bfloat16()).float().mean() > 0.9).item()


def test_dead_rows_are_kept_or_dropped_with_the_same_result(device, monkeypatch) -> None:
    problem = narrow_problem(device, 3, torch.bfloat16, groups=(6, 5, 4), repeat_rows=False)
    loss = fastrank.RRHF(sft_weight=0.0)
    for drop in (True, False):
        monkeypatch.setattr(dropping, "decide", lambda device, width, drop=drop: drop)
        check_ranking(problem, loss)


def test_what_a_problem_lacks_is_no_branch_of_its_own(device) -> None:
    variant = {"bias": False, "softcap": None, "logit_scale": 1.0, "repeat_rows": False}
    check_ranking(narrow_problem(device, 4, torch.bfloat16, **variant), fastrank.PRO())


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 100, 25))
def test_random_problems(device, monkeypatch, first) -> None:
    """A hundred problems: every loss, odd vocabularies, all options and budgets, dead rows dropped
    or kept, a float32 head under autocast or a narrow one."""
    losses = [cls() for cls in LOSSES.values()]
    for seed in range(first, first + 25):
        g = torch.Generator().manual_seed(seed)
        pick = torch.randint(0, 2, (7,), generator=g).tolist()
        dtype = torch.bfloat16 if seed % 4 else torch.float16
        autocast, drop = dtype == torch.bfloat16 and bool(pick[5]), bool(pick[6])
        monkeypatch.setattr(dropping, "decide", lambda device, width, drop=drop: drop)
        problem = narrow_problem(
            device, seed, dtype,
            vocab=int(torch.randint(3, 200, (), generator=g)) * 2 + 1, width=16,
            bias=bool(pick[0]), softcap=8.0 if pick[1] else None,
            logit_scale=0.7 if pick[2] else 1.0, repeat_rows=bool(pick[3]),
            frozen_head=bool(pick[4]),
        )  # fmt: skip
        pitch = row_pitch(problem.weight.shape[0])
        budget = [None, 45, 3][seed % 3]
        memory = None if budget is None else budget * 4 * pitch
        if autocast:
            widen_head(problem)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            check_ranking(problem, losses[seed % len(losses)], logits_memory=memory)
            check_logprobs(problem, logits_memory=memory)
