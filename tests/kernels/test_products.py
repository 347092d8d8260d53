"""Which backend and which products serve a dtype, and the memory that logits take."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from plain_linear import largest_error, make_problem
from torch.utils._python_dispatch import TorchDispatchMode

import fastrank
from fastrank_kernels import (
    choose_backend,
    dropping,
    gradients,
    host_memory,
    linear,
    products,
    projection,
)
from fastrank_kernels.planner import row_pitch
from fastrank_kernels.products import product

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_gpu_computes_by_kernels_unless_in_float64(dtype) -> None:
    pytest.importorskip("triton")
    assert choose_backend(None, CUDA, dtype)[0] == "triton"
    assert choose_backend("triton", CUDA, dtype) == ("triton", "asked for")
    assert choose_backend(None, CUDA, torch.float64) == (
        "torch",
        "the kernels do not compute in float64",
    )
    with pytest.raises(ValueError, match=r"expected float32.* got float64; backend='torch'"):
        choose_backend("triton", CUDA, torch.float64)


class Products(TorchDispatchMode):
    """The dtypes of what is multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.name().split("::")[1].split(".")[0] in ("mm", "addmm", "addmm_", "bmm"):
            self.dtypes |= {x.dtype for x in args if isinstance(x, torch.Tensor)}
        return function(*args, **(kwargs or {}))


def within(mode: TorchDispatchMode, function: Callable[..., Any]) -> Callable[..., Any]:
    def inner(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return function(*args, **kwargs)

    return inner


@pytest.mark.parametrize("autocast", [False, True], ids=["narrow inputs", "autocast"])
@pytest.mark.parametrize("frozen", [False, True], ids=["head", "frozen head"])
@pytest.mark.parametrize("logits_memory", [None, 2 * 128 * 30, 2 * 128 * 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_without_instructions_products_are_made_in_float32(
    monkeypatch, dtype, logits_memory, frozen, autocast
) -> None:
    monkeypatch.setattr(products, "narrow_products", lambda dtype: (False, "for a test"))
    monkeypatch.setattr(products, "_BLOCK", 40)
    problem = make_problem(11, frozen_head=frozen, longest=10).to(dtype)
    upstream = torch.randn(len(problem.labels))

    def fused(problem) -> list[torch.Tensor]:
        out = problem.fused(fastrank.PRO(), logits_memory=logits_memory)
        grads = torch.autograd.grad(out.loss, problem.leaves())
        logp = fastrank.token_logprobs(
            problem.hidden, problem.weight, problem.labels, **problem.head(),
            logits_memory=logits_memory,
        )  # fmt: skip
        return [*grads, *torch.autograd.grad(logp, problem.leaves(), upstream.to(logp.dtype))]

    exact = fused(problem.to(torch.float64))
    seen = Products()
    # A mode does not look into an operator from outside.
    for name in ("rank", "forward", "backward"):
        monkeypatch.setattr(linear, name, within(seen, getattr(linear, name)))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = fused(problem.to(torch.float32) if autocast else problem)
    assert seen.dtypes == {torch.float32}
    computed = torch.bfloat16 if autocast else dtype
    assert largest_error(got, exact) < {torch.bfloat16: 0.05, torch.float16: 0.006}[computed]


@pytest.mark.parametrize("add", [False, True], ids=["set", "add"])
@pytest.mark.parametrize("sizes", [(100, 7, 5), (7, 100, 5), (7, 5, 100)])
@pytest.mark.parametrize("wide", [False, True], ids=["narrow", "wide"])
def test_blocks_along_the_largest_side(monkeypatch, sizes, wide, add) -> None:
    monkeypatch.setattr(products, "_BLOCK", 16)
    monkeypatch.setattr(products, "narrow_products", lambda dtype: (False, "for a test"))
    rows, inner, columns = sizes
    left, right = torch.randn(rows, inner).bfloat16(), torch.randn(inner, columns).bfloat16()
    out = torch.full((rows, columns + 3), 2.0, dtype=torch.float32 if wide else torch.bfloat16)
    exact = left.double() @ right.double() + (2.0 if add else 0.0)
    product(left, right, out[:, :columns], add=add)
    rounding = (2.0**-21 if wide else 2.0**-8) * max(1.0, exact.abs().max().item())
    assert (out[:, :columns] - exact).abs().max() <= rounding
    assert (out[:, columns:] == 2.0).all()


def test_what_the_cpu_multiplies_is_asked_for() -> None:
    supported, why = products.narrow_products(torch.bfloat16)
    assert supported == torch.ops.mkldnn._is_mkldnn_bf16_supported() and "bfloat16" in why
    assert products.narrow_products(torch.float32)[0]


@pytest.mark.parametrize("vocab", [97, 32001])
def test_products_take_rows_of_a_padded_pitch(vocab) -> None:
    """As logits and as a gradient over them; the padding is never looked at."""
    hidden, weight = torch.randn(6, 8), torch.randn(vocab, 8)
    memory = torch.full((6, row_pitch(vocab)), math.nan)
    logits = torch.mm(hidden, weight.t(), out=memory[:, :vocab])
    assert logits.data_ptr() == memory.data_ptr()
    torch.testing.assert_close(logits, hidden @ weight.t())
    assert memory[:, vocab:].isnan().all()
    torch.testing.assert_close(logits.t() @ hidden, logits.t().contiguous() @ hidden)


def test_keeping_logits_takes_one_more_narrow_matrix(monkeypatch) -> None:
    """The backward of kept float32 logits once made another such matrix to use half of it."""
    sizes: list[int] = []
    empty = torch.empty

    def counted(shape, dtype, device):
        sizes.append(math.prod(shape) * dtype.itemsize)
        return empty(shape, dtype=dtype, device=device)

    monkeypatch.setattr(host_memory, "empty", counted)
    monkeypatch.setattr(projection, "writes_wide", lambda device: True)

    def wide(left, right, out, *, add=False):
        made = left.float() @ right.float()
        return out.copy_(out + made if add else made)

    for module in (projection, gradients):
        monkeypatch.setattr(module, "product", wide)
    tokens, vocab, width = 40, 6400, 8
    hidden = torch.randn(tokens, width).bfloat16().requires_grad_()
    weight = torch.randn(vocab, width).bfloat16().requires_grad_()
    logp = fastrank.token_logprobs(hidden, weight, torch.randint(0, vocab, (tokens,)))
    logp.sum().backward()
    assert [x for x in sizes if x] == [4 * tokens * vocab, 2 * tokens * vocab, 2 * vocab * width]


def test_dropping_rows_pays_by_their_share_and_the_width() -> None:
    assert dropping.decide(CPU, 16)
    assert not dropping.pays(1.0, 4096) and not dropping.pays(0.97, 4096)
    assert dropping.pays(0.9, 4096) and dropping.pays(0.0, 64)


def test_a_cpu_remembers_no_share(monkeypatch) -> None:
    """The same call gives the same bits whatever was live in the calls between."""
    monkeypatch.setattr(dropping, "_last", {})
    problem = make_problem(8, groups=(6, 5)).to(torch.float32)
    own, results = problem.rewards, []
    for rewards in (own, torch.zeros_like(own), torch.arange(11.0), own):
        problem.rewards = rewards
        results.append(problem.value_and_gradients(fastrank.RRHF(sft_weight=0.0)))
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[-1], strict=True))
    assert not results[1][0] and results[2][0] and not dropping._last


def test_a_gpu_decides_by_the_call_before(monkeypatch) -> None:
    class Arrived:
        def synchronize(self) -> None:
            waited.append(True)

    waited: list[bool] = []
    monkeypatch.setattr(dropping, "_last", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert not dropping.decide(CUDA, 4096)
    dropping._last[CUDA] = dropping._Share(torch.tensor(0.5), Arrived())
    assert dropping.decide(CUDA, 4096) and waited
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not dropping.decide(CUDA, 4096)
