"""`live_rows` and `segment_sum` against the reference."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from fastrank_kernels import reference, triton_backend  # noqa: E402


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
