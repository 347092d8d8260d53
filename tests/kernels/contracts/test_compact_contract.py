"""`live_rows`, `segment_sum` and `rescale_` against the reference."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from fastrank_kernels import reference, rescale, triton_backend  # noqa: E402


def test_live_rows_rise_and_nan_is_live(device) -> None:
    coefficients = torch.randn(5000, device=device)
    coefficients[torch.rand(5000, device=device) < 0.4] = 0.0
    coefficients[[7, 4000]] = float("nan")
    coefficients[[8, 4001]] = -0.0
    live = triton_backend.live_rows(coefficients)
    assert live.dtype == torch.int64 and torch.equal(live, reference.live_rows(coefficients))
    assert {7, 4000} <= set(live.tolist()) and not {8, 4001} & set(live.tolist())
    assert (live.diff() > 0).all()


def test_live_rows_of_nothing(device) -> None:
    assert triton_backend.live_rows(torch.zeros(9, device=device)).shape == (0,)
    assert triton_backend.live_rows(torch.empty(0, device=device)).shape == (0,)


def test_live_rows_need_a_device_where_kernels_run() -> None:
    with pytest.raises(ValueError, match="coefficients must be on a .* device .* got meta"):
        triton_backend.live_rows(torch.zeros(3, device="meta"))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
def test_segment_sums(device, poisoned, dtype) -> None:
    lengths = [0, 1, 255, 256, 257, 0, 1000, 3]
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    values = torch.randn(sum(lengths), device=device).to(dtype)
    sums = triton_backend.segment_sum(values, offsets)
    expected = reference.segment_sum(values.double(), offsets)
    assert sums.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-7
    torch.testing.assert_close(sums.double(), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(sums, triton_backend.segment_sum(values, offsets.long().to(device)))


def test_a_sum_that_cancels_keeps_its_digits(device) -> None:
    """float32 accumulation would lose the ones beside the large numbers."""
    values = torch.tensor([1e8, 1.0, -1e8] * 400, device=device)
    sums = triton_backend.segment_sum(values, torch.tensor([0, 1200], dtype=torch.int32))
    assert sums.item() == 400.0


def test_offsets_beyond_the_values_are_not_read(device) -> None:
    values = torch.ones(10, device=device)
    offsets = torch.tensor([-5, 4, 2**31 - 1], dtype=torch.int32).to(device)
    assert triton_backend.segment_sum(values, offsets).tolist() == [4.0, 6.0]


@pytest.mark.parametrize(
    ("values", "offsets", "message"),
    [
        (torch.ones(4).long(), torch.tensor([0, 4]), r"values must be float32.* got int64"),
        (torch.ones(4), torch.tensor([0.0, 4.0]), r"offsets must be int64, int32 .* got float32"),
        (torch.ones(2, 2), torch.tensor([0, 4]), r"must have shapes .* got \(2, 2\) and \(2,\)"),
    ],
)
def test_what_is_wrong_is_named(device, values, offsets, message) -> None:
    with pytest.raises(ValueError, match=message):
        triton_backend.segment_sum(values.to(device), offsets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rescaled_in_place(device, monkeypatch, dtype) -> None:
    """The product is made in float32 and rounded once; each program walks over its share."""
    monkeypatch.setattr(rescale, "_PROGRAMS", 3)
    values = torch.randn(4096 * 7 + 5, device=device).to(dtype)
    factor = torch.tensor(-1 / 3, device=device)
    expected = (values.float() * factor).to(dtype)
    assert triton_backend.rescale_(values, factor) is values
    assert torch.equal(values, expected)


def test_a_factor_of_one_writes_nothing(device) -> None:
    """What is not touched keeps even a NaN's bits, and a read-only mapping would not fault."""
    values = torch.randn(5000, device=device)
    values.view(torch.int32)[7] = 0x7FC12345
    before = values.view(torch.int32).clone()
    triton_backend.rescale_(values, torch.ones((), device=device))
    assert torch.equal(values.view(torch.int32), before)
    values = torch.ones(3, device=device)
    assert triton_backend.rescale_(values, torch.tensor(float("nan"), device=device)).isnan().all()


def test_what_rescale_cannot_take_is_named(device) -> None:
    values, factor = torch.ones(4, 6, device=device), torch.ones((), device=device)
    with pytest.raises(ValueError, match=r"values must be contiguous, got strides \(1, 6\)"):
        triton_backend.rescale_(values.t(), factor)
    with pytest.raises(ValueError, match=r"factor must have shape \(\), got \(1,\)"):
        triton_backend.rescale_(values, factor[None])
