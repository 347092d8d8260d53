"""`unit_dlogits` against float64: one pass gives what `row_stats` and `dlogits` give in two."""

from __future__ import annotations

import pytest
import torch
from error_budget import gradient_error, log_probability_error
from torch import Tensor

pytest.importorskip("triton")

from fastrank_kernels import reference, triton_backend  # noqa: E402
from fastrank_kernels.planner import row_pitch  # noqa: E402
from fastrank_kernels.unit_dlogits import SLACK  # noqa: E402

OPTIONS = {
    "bare": {"bias": False, "logit_scale": 1.0, "softcap": None},
    "bias and scale": {"bias": True, "logit_scale": -0.37, "softcap": None},
    "softcap": {"bias": False, "logit_scale": 1.0, "softcap": 30.0},
    "all": {"bias": True, "logit_scale": 1.7, "softcap": 7.5},
}
NAN, INF = float("nan"), float("inf")


class Case:
    """Logits in rows of a padded pitch, with NaN behind the vocabulary, and what is exact."""

    def __init__(self, logits: Tensor, labels: Tensor, bias=None, logit_scale=1.0, softcap=None):
        self.memory = torch.full(
            (len(logits), row_pitch(logits.shape[1])), NAN, device=labels.device
        )
        self.logits = self.memory[:, : logits.shape[1]]
        self.logits.copy_(logits)
        self.labels, self.bias = labels, bias
        self.scale, self.cap = logit_scale, softcap

    def exact(self) -> tuple[Tensor, Tensor, Tensor]:
        """Final logits, log-probabilities and their derivative by the logits, in float64, from the
        operators that make them in two passes."""
        wide, bias = self.logits.double(), None if self.bias is None else self.bias.double()
        options = (bias, self.scale, self.cap)
        lse, logp = reference.row_stats(wide, self.labels, *options)
        grad = torch.empty_like(wide)
        ones = torch.ones_like(lse)
        reference.dlogits(wide, self.labels, lse, logp, ones, *options, out=grad)
        z = (wide if bias is None else wide + bias) * self.scale
        return z if self.cap is None else self.cap * torch.tanh(z / self.cap), logp, grad

    def run(self, dtype=torch.float32, *, over=False, module=triton_backend):
        """Log-probabilities and their derivative, in memory of its own or over the logits."""
        rows, vocab = self.logits.shape
        memory = self.memory.clone()
        logits = memory[:, :vocab]
        out = memory.view(dtype)[:, :vocab]
        if not over:
            out = torch.full((rows, vocab + 3), NAN, dtype=dtype, device=memory.device)[:, :vocab]
        logp, factor = module.unit_dlogits(
            logits, self.labels, self.bias, self.scale, self.cap, out=out
        )
        assert logp.dtype == factor.dtype and logp.dtype.itemsize >= 4
        if not over:
            assert torch.equal(logits, self.logits) or logits.isnan().any()
            assert out._base[:, vocab:].isnan().all()
        return logp, factor, out


def random_case(device, rows: int, vocab: int, *, spread: float = 4.0, **options) -> Case:
    bias = torch.randn(vocab, device=device).bfloat16() if options.pop("bias", False) else None
    labels = torch.randint(0, vocab, (rows,), device=device)
    return Case(torch.randn(rows, vocab) * spread, labels, bias, **options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("vocab", [1, 7, 257, 4101])
def test_equals_two_passes_in_float64(device, poisoned, approximate, vocab, options) -> None:
    case = random_case(device, 5, vocab, **options)
    z, exact_logp, exact = case.exact()
    for over in (False, True):
        logp, factor, out = case.run(over=over)
        assert (logp <= 0).all()
        assert ((logp - exact_logp).abs() <= log_probability_error(z, case.cap)).all()
        error = (factor[:, None].double() * out.double() - exact).abs().amax(1)
        assert (error <= gradient_error(z, case.cap, torch.ones_like(factor), case.scale)).all()
    narrow = case.run(torch.bfloat16)
    over = case.run(torch.bfloat16, over=True)
    assert all(torch.equal(a, b) for a, b in zip(narrow, over, strict=True))
    rounded = (narrow[2].float() - out).abs()
    assert (rounded <= out.abs() * (2.0**-8 + 2.0**-20)).all()


def test_the_reference_is_the_same_operator(device) -> None:
    case = random_case(device, 5, 300, **OPTIONS["all"])
    case.labels[3] = 300
    z, exact_logp, exact = case.exact()
    for over in (False, True):
        logp, factor, out = case.run(module=reference, over=over)
        torch.testing.assert_close(logp.double(), exact_logp, equal_nan=True)
        torch.testing.assert_close(
            (factor[:, None] * out).double(), exact, rtol=1e-5, atol=1e-6, equal_nan=True
        )


def rising(device, vocab: int) -> Case:
    """Rows whose maximum jumps by more than the slack, in the middle, at the end, many times."""
    logits = torch.randn(7, vocab) * 2
    logits[0] += torch.linspace(0, 900, vocab)
    logits[1, vocab // 2 :] += SLACK + 20
    logits[2, -1] = 3 * SLACK
    logits[3, :-5] = -INF
    logits[4] -= torch.linspace(0, 900, vocab)
    logits[5, 4095] = SLACK - 5  # within the slack: nothing is brought to a new reference
    logits[6] = torch.linspace(-1e30, 1e30, vocab)
    labels = torch.tensor([vocab - 3, 5, 17, vocab - 2, 3, vocab - 9, vocab - 1], device=device)
    return Case(logits, labels)


@pytest.mark.parametrize("over", [False, True], ids=["separate", "over the logits"])
def test_a_maximum_that_rises(device, over) -> None:
    case = rising(device, 4096 * 3 + 77)
    z, exact_logp, exact = case.exact()
    logp, factor, out = case.run(over=over)
    assert ((logp - exact_logp).abs() <= log_probability_error(z, case.cap)).all()
    error = (factor[:, None].double() * out.double() - exact).abs().amax(1)
    # Nothing overflows, and what lies far below the maximum may vanish.
    assert (error <= gradient_error(z, None, torch.ones_like(factor))).all()
    logp, factor, out = case.run(torch.bfloat16, over=over)
    assert ((logp - exact_logp).abs() <= log_probability_error(z, case.cap)).all()
    error = (factor[:, None].double() * out.double() - exact).abs()
    # One more rounding for a value that was rescaled.
    assert (
        error <= exact.abs() * 2.0**-6 + gradient_error(z, None, torch.ones_like(factor))[:, None]
    ).all()


def test_extreme_rows(device) -> None:
    """What is not finite makes its row's log-probability and products so, and no other row's."""
    logits = torch.randn(8, 300)
    logits[0] = -INF
    logits[1, 250] = INF
    logits[2, 290] = NAN
    logits[3] = 3e38
    logits[4] = -3.4028234663852886e38
    logits[5, :299] = -INF
    logits[6, 5] = -INF
    labels = torch.tensor([0, 5, 7, 8, 9, 299, 5, 299], device=device)
    case = Case(logits, labels)
    logp, factor, out = case.run()
    options = (None, 1.0, None)
    _, expected = reference.row_stats(case.logits, labels, *options)
    torch.testing.assert_close(logp, expected, equal_nan=True)
    # In float64, and without a log-sum-exp in which the largest numbers would drown the sum.
    exact = torch.nn.functional.one_hot(labels, 300) - torch.softmax(case.logits.double(), -1)
    weight = torch.randn(300, 3, device=device).double()
    products = factor[:, None].double() * (out.double() @ weight)
    torch.testing.assert_close(products, exact @ weight, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert products.isfinite().all(1).tolist() == [False] * 3 + [True] * 5
    assert logp[5] == 0 and logp[6] == -INF


@pytest.mark.parametrize("integer", [torch.int64, torch.int32], ids=str)
def test_a_label_outside_the_vocabulary_puts_nan_into_its_row(device, integer) -> None:
    case = random_case(device, 5, 100)
    outside = 2**40 if integer == torch.int64 else 2**31 - 1
    case.labels = torch.tensor([-1, 100, outside, 99, 0], device=device, dtype=integer)
    logp, factor, out = case.run()
    assert logp.isnan().tolist() == [True, True, True, False, False]
    assert out.isnan().sum() == 3 and out[0, 0].isnan() and out[1:3, 99].isnan().all()
    softmax = torch.softmax(case.logits.double(), -1)
    torch.testing.assert_close(
        (factor[:, None] * out)[:3, 1:99].double(), -softmax[:3, 1:99], rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("spread", [0.5, 4.0, 15.0])
def test_products_are_no_worse_than_plain_pytorch(device, spread) -> None:
    """The gradients of hidden rows and head in bfloat16, confident tokens among the others: the
    factor is applied to the rows of what is multiplied and rounded once more than in two passes."""
    tokens, vocab, width = 48, 1003, 24
    hidden = torch.randn(tokens, width, device=device).bfloat16()
    weight = (torch.randn(vocab, width, device=device) * spread / width**0.5).bfloat16()
    labels = torch.randint(0, vocab, (tokens,), device=device)
    certain = (
        torch.linspace(0.5, 1.2, 16, device=device)[:, None] * hidden[:16] * max(1, spread / 4)
    )
    weight[labels[:16]] = certain.bfloat16()
    upstream = torch.randn(tokens, device=device)

    def gradients(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
        logits = leaves[0] @ leaves[1].t()
        logits = logits if dtype == torch.float64 else logits.float()
        logp = torch.log_softmax(logits, -1).gather(1, labels[:, None]).squeeze(1)
        return torch.autograd.grad(logp, leaves, upstream.to(logp.dtype))

    case = Case(hidden.float() @ weight.float().t(), labels)
    logp, factor, out = case.run(torch.bfloat16, over=True)
    assert (logp.exp() > 0.99).sum() >= 4
    rows = (upstream * factor)[:, None]
    ours = (
        ((out.float() @ weight.float()) * rows).bfloat16(),
        (out.float().t() @ (hidden.float() * rows).bfloat16().float()).bfloat16(),
    )
    for got, plain, exact in zip(
        ours, gradients(torch.bfloat16), gradients(torch.float64), strict=True
    ):
        error, theirs = ((x.double() - exact).norm() / exact.norm() for x in (got, plain))
        assert error <= theirs, (error, theirs)
        assert error < 0.005


def test_row_offsets_pass_two_to_the_31_and_bits_repeat(device) -> None:
    stride, vocab = 2**30 + 16, 70
    memory = torch.empty(2 * stride + vocab, dtype=torch.float16, device=device)
    case = random_case(device, 3, vocab)
    logits = memory.as_strided((3, vocab), (stride, 1))
    logits.copy_(case.logits)
    results = []
    for source in (logits, logits, logits.clone(memory_format=torch.contiguous_format)):
        out = torch.empty(3, vocab, dtype=torch.bfloat16, device=device)
        stats = triton_backend.unit_dlogits(source, case.labels, None, 1.0, None, out=out)
        results.append((*stats, out))
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(3, 8).double()}, r"logits must be float32.*'torch'"),
        ({"labels": torch.zeros(4, dtype=torch.int64)}, r"labels must have shape \(3,\), got"),
        ({"bias": torch.zeros(7)}, r"bias must have shape \(8,\), got \(7,\)"),
        ({"out": torch.zeros(3, 9)}, r"out must have shape \(3, 8\), got \(3, 9\)"),
        ({"out": torch.zeros(3, 8).half()}, r"out must be float32, bfloat16 .* got float16"),
        ({"out": torch.zeros(3, 8, device="meta")}, r"out must be on .* like logits, got meta"),
        ({"out": torch.zeros(8)}, r"out must have rows that do not overlap, got strides \(0, 1\)"),
    ],
)
def test_what_is_wrong_is_named(device, change, message) -> None:
    arguments = {
        "logits": torch.zeros(3, 8),
        "labels": torch.zeros(3, dtype=torch.int64),
        "bias": torch.zeros(8),
        "out": torch.zeros(3, 8),
    } | change
    arguments = {k: v if v.device.type == "meta" else v.to(device) for k, v in arguments.items()}
    if arguments["out"].dim() == 1:
        arguments["out"] = arguments["out"].expand(3, 8)
    with pytest.raises(ValueError, match=message):
        triton_backend.unit_dlogits(**arguments, logit_scale=1.0, softcap=None)


def test_no_rows(device) -> None:
    case = Case(torch.empty(0, 10), torch.empty(0, dtype=torch.int64, device=device))
    logp, factor, out = case.run()
    assert logp.shape == factor.shape == (0,) and out.shape == (0, 10)
