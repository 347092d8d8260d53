"""`row_stats` against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from error_budget import log_probability_error

pytest.importorskip("triton")

from fastrank_kernels import reference, triton_backend  # noqa: E402

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPTIONS = {
    "bare": {"bias": False, "logit_scale": 1.0, "softcap": None},
    "bias and scale": {"bias": True, "logit_scale": 0.37, "softcap": None},
    "softcap": {"bias": False, "logit_scale": 1.0, "softcap": 30.0},
    "all": {"bias": True, "logit_scale": 1.7, "softcap": 7.5},
}


def final(logits: torch.Tensor, bias=None, scale=1.0, cap=None) -> torch.Tensor:
    """The final logits in float64."""
    z = (logits.double() if bias is None else logits.double() + bias.double()) * scale
    return z if cap is None else cap * torch.tanh(z / cap)


def strided_rows(rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Rows of random logits with NaN between them, which no kernel may read."""
    memory = torch.full((rows, vocab + 5), float("nan"), dtype=dtype, device=device)
    logits = memory[:, :vocab]
    logits.copy_(torch.randn(rows, vocab) * 5)
    return logits


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("vocab", [1, 7, 31, 32, 257, 1000, 2048, 4101])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_reference(device, poisoned, approximate, dtype, vocab, options) -> None:
    logits = strided_rows(3, vocab, dtype, device)
    labels = torch.randint(0, vocab, (3,), device=device)
    bias = torch.randn(vocab, device=device).to(dtype) if options["bias"] else None
    scale, cap = options["logit_scale"], options["softcap"]
    lse, logp = triton_backend.row_stats(logits, labels, bias, scale, cap)
    wide_bias = None if bias is None else bias.double()
    expected = reference.row_stats(logits.double(), labels, wide_bias, scale, cap)
    assert lse.dtype == logp.dtype == torch.float32
    budget = log_probability_error(final(logits, bias, scale, cap), cap)
    for got, exact in zip((lse, logp), expected, strict=True):
        assert ((got - exact).abs() <= budget).all()
    assert (logp <= 0).all()


@pytest.mark.parametrize("options", [OPTIONS["bare"], OPTIONS["all"]], ids=["bare", "all"])
def test_a_part_of_the_vocabulary_gives_its_own_labels_logits(
    device, poisoned, approximate, options
) -> None:
    """Of the other labels, before and after the part, nothing is read, and 0 is given."""
    vocab = 301
    logits = strided_rows(5, vocab, torch.float32, device)
    labels = torch.tensor([5, -3, vocab, vocab - 1, 10**6], device=device)
    bias = torch.randn(vocab, device=device) if options["bias"] else None
    scale, cap = options["logit_scale"], options["softcap"]
    lse, target = triton_backend.row_stats(logits, labels, bias, scale, cap, sharded=True)
    z = final(logits, bias, scale, cap)
    wide_bias = None if bias is None else bias.double()
    close = {"rtol": 2e-6, "atol": 1e-5}
    for module_lse, module_target in (
        (lse, target),
        reference.row_stats(logits.double(), labels, wide_bias, scale, cap, sharded=True),
    ):
        torch.testing.assert_close(module_lse.double(), torch.logsumexp(z, -1), **close)
        assert (module_target[[1, 2, 4]] == 0).all()
        own = z[[0, 3], [5, vocab - 1]]
        torch.testing.assert_close(module_target[[0, 3]].double(), own, **close)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_no_larger_than_that_of_plain_pytorch(device, dtype) -> None:
    logits = strided_rows(16, 3001, dtype, device)
    labels = torch.randint(0, 3001, (16,), device=device)
    _, logp = triton_backend.row_stats(logits, labels, None, 1.0, None)
    _, exact = reference.row_stats(logits.double(), labels, None, 1.0, None)
    plain = torch.log_softmax(logits, -1).gather(1, labels[:, None]).squeeze(1)
    ours, theirs = ((x.double() - exact).abs().max() for x in (logp, plain))
    # In float32 both are a few roundings of numbers near 10 away from the truth.
    assert ours <= max(theirs, log_probability_error(final(logits), None).max())


def test_a_label_outside_the_vocabulary_is_not_read(device, poisoned) -> None:
    logits = strided_rows(6, 100, torch.float32, device)
    labels = torch.tensor([-1, 100, 2**40, -(2**62), 99, 0], device=device)
    lse, logp = triton_backend.row_stats(logits, labels, torch.zeros(100, device=device), 1.0, None)
    expected_lse, expected = reference.row_stats(logits, labels, None, 1.0, None)
    assert logp[:4].isnan().all()
    torch.testing.assert_close(logp, expected, equal_nan=True)
    torch.testing.assert_close(lse, expected_lse)


def test_int32_labels(device) -> None:
    logits = strided_rows(4, 50, torch.float32, device)
    labels = torch.tensor([0, 49, -1, 7], device=device)
    expected = triton_backend.row_stats(logits, labels, None, 1.0, None)
    actual = triton_backend.row_stats(logits, labels.int(), None, 1.0, None)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def test_extreme_rows(device) -> None:
    inf, nan = float("inf"), float("nan")
    logits = torch.randn(8, 300, device=device)
    logits[0] = -inf
    logits[1, 250] = inf
    logits[2, [3, 35, 259]] = inf
    logits[3, 290] = nan
    logits[4] = 3e38
    logits[5] = -3.4028234663852886e38
    logits[6, :299] = -inf
    logits[7] = torch.linspace(-1e30, 1e30, 300)
    labels = torch.tensor([0, 5, 3, 7, 8, 9, 299, 299], device=device)
    lse, logp = triton_backend.row_stats(logits, labels, None, 1.0, None)
    expected = reference.row_stats(logits, labels, None, 1.0, None)
    torch.testing.assert_close(lse, expected[0], equal_nan=True)
    torch.testing.assert_close(logp, expected[1], equal_nan=True)
    assert logp[6] == 0 and logp[7] == 0


def test_a_certain_token_has_log_probability_zero_and_never_more(device) -> None:
    logits = torch.full((64, 129), -40.0, device=device)
    labels = torch.arange(64, device=device)
    logits[labels, labels] = torch.linspace(-3, 70, 64, device=device)
    _, logp = triton_backend.row_stats(logits, labels, None, 1.0, None)
    assert (logp <= 0).all() and (logp > -1e-6).all()


def test_row_offsets_pass_two_to_the_31(device) -> None:
    """Rows 2^30 + 5 elements apart, in memory that nobody touches but where the rows are."""
    stride, vocab = 2**30 + 5, 70
    memory = torch.empty(2 * stride + vocab, dtype=torch.float16, device=device)
    logits = memory.as_strided((3, vocab), (stride, 1))
    logits.copy_(torch.randn(3, vocab) * 3)
    labels = torch.tensor([1, 69, 33], device=device)
    lse, logp = triton_backend.row_stats(logits, labels, None, 1.0, None)
    expected = reference.row_stats(logits.double(), labels, None, 1.0, None)
    for got, exact in zip((lse, logp), expected, strict=True):
        assert ((got - exact).abs() <= log_probability_error(final(logits), None)).all()


def test_the_same_input_gives_the_same_bits(device) -> None:
    logits = strided_rows(9, 5003, torch.float32, device)
    labels = torch.randint(0, 5003, (9,), device=device)
    first = triton_backend.row_stats(logits, labels, None, 0.3, 20.0)
    for _ in range(3):
        again = triton_backend.row_stats(logits, labels, None, 0.3, 20.0)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


def test_no_rows(device) -> None:
    logits = torch.empty(0, 10, device=device)
    labels = torch.empty(0, dtype=torch.int64, device=device)
    lse, logp = triton_backend.row_stats(logits, labels, None, 1.0, None)
    assert lse.shape == logp.shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(3, 8, dtype=torch.float64)}, r"logits must be float32.*'torch'"),
        ({"logits": torch.zeros(8, 3).t()}, r"logits must have contiguous rows, got strides"),
        ({"logits": torch.zeros(24)}, r"logits must have shape \[rows, V\], got \(24,\)"),
        ({"labels": torch.zeros(4, dtype=torch.int64)}, r"labels must have shape \(3,\), got"),
        ({"labels": torch.zeros(3)}, r"labels must be int64, int32 .* got float32"),
        ({"bias": torch.zeros(7)}, r"bias must have shape \(8,\), got \(7,\)"),
        ({"bias": torch.zeros(8, device="meta")}, r"bias must be on .* like logits, got meta"),
    ],
)
def test_what_is_wrong_is_named(device, change, message) -> None:
    arguments = {
        "logits": torch.zeros(3, 8),
        "labels": torch.zeros(3, dtype=torch.int64),
        "bias": torch.zeros(8),
    }
    arguments = {
        name: value if value.device.type == "meta" else value.to(device)
        for name, value in (arguments | change).items()
    }
    if "logits" in change and change["logits"].dim() == 2 and not change["logits"].is_contiguous():
        arguments["logits"] = torch.zeros(8, 3, device=device).t()
    with pytest.raises(ValueError, match=message):
        triton_backend.row_stats(**arguments, logit_scale=1.0, softcap=None)


def test_tensors_must_be_where_kernels_run(device) -> None:
    elsewhere = torch.zeros(2, 4, device="meta")
    with pytest.raises(ValueError, match="logits must be on a .* device .* got meta"):
        triton_backend.row_stats(elsewhere, torch.zeros(2, dtype=torch.int64), None, 1.0, None)
