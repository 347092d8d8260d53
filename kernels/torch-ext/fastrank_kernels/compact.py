# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Indices of the live rows, and sums over segments: both in a fixed order, without atomics.

Live rows are found by ``torch.nonzero``. The number of live rows sizes the matrix products that
follow, so it has to reach the host in any case; given that, nonzero's own count, prefix sum and
scatter do the work of a kernel here, in a rising order that does not depend on the schedule.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .host_memory import send
from .launch import FLOATS, INTEGERS, Launch, require_device, require_dtype, run


def live_rows(coefficients: Tensor) -> Tensor:
    """`reference.live_rows`: int64 rising indices of coefficients that are not exactly zero. NaN is
    live.

    Waits for the device, because the result's length depends on the data.
    """
    require_device(coefficients=coefficients)
    return torch.nonzero(coefficients).squeeze(1)


@triton.jit(do_not_specialize=["values", "offsets", "sums", "total"])
def segment_sum_kernel(values, offsets, sums, total, BLOCK: tl.constexpr):
    segment = tl.program_id(0)
    start = tl.maximum(tl.load(offsets + segment).to(tl.int32), 0)
    stop = tl.minimum(tl.load(offsets + segment + 1).to(tl.int32), total)
    lanes = tl.zeros((BLOCK,), tl.float64)
    for offset in range(start, stop, BLOCK):
        index = offset + tl.arange(0, BLOCK)
        lanes += tl.load(values + index, mask=index < stop, other=0.0).to(tl.float64)
    tl.store(sums + segment, tl.sum(lanes, 0).to(sums.dtype.element_ty))


def plan_segment_sum(values: Tensor, offsets: Tensor, sums: Tensor) -> Launch:
    """The launch that `segment_sum` does, for tensors on any device."""
    arguments = {
        "values": values.contiguous(),
        "offsets": send(offsets, values.device).contiguous(),
        "sums": sums,
        "total": values.numel(),
        "BLOCK": 256,
    }
    return Launch(segment_sum_kernel, (sums.numel(),), arguments, num_warps=2, fp_fusion=False)


def segment_sum(values: Tensor, offsets: Tensor) -> Tensor:
    """`reference.segment_sum`: float32 [segments], float64 for float64, accumulated in float64.

    One program per segment. ``offsets`` int32 [segments + 1] may be on the host.
    """
    require_device(values=values)
    require_dtype((*FLOATS, torch.float64), values=values)
    require_dtype(INTEGERS, offsets=offsets)
    if values.dim() != 1 or offsets.dim() != 1 or offsets.numel() < 1:
        raise ValueError(
            "values and offsets must have shapes [T] and [segments + 1], "
            f"got {tuple(values.shape)} and {tuple(offsets.shape)}"
        )
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    sums = torch.empty(offsets.numel() - 1, dtype=dtype, device=values.device)
    run(plan_segment_sum(values, offsets, sums), values.device)
    return sums
