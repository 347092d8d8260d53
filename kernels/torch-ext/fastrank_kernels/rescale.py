# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Gradients times a factor that only the device knows, in place, and at no cost if it is 1.

The factor that comes from above a loss is 1 as a rule (``loss.backward()``), which the host cannot
see without waiting. Each program looks for itself and leaves at once: the head's gradient, the
largest tensor of a step, is not read and written again. Few programs walk over all elements, so
that leaving costs microseconds whatever the size.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import FLOATS, Launch, require_device, require_dtype, require_shape, run

_BLOCK = 4096
_PROGRAMS = 2048


@triton.jit(do_not_specialize=["factor"])
def rescale_kernel(values, factor, size, BLOCK: tl.constexpr):
    scale = tl.load(factor).to(tl.float32)
    if scale != 1.0:
        first = tl.program_id(0).to(tl.int64) * BLOCK
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for start in range(first, size, step):
            index = start + tl.arange(0, BLOCK)
            x = tl.load(values + index, mask=index < size, other=0.0).to(tl.float32) * scale
            tl.store(values + index, x.to(values.dtype.element_ty), mask=index < size)


def plan_rescale(values: Tensor, factor: Tensor) -> Launch:
    """The launch that `rescale_` does, for tensors on any device."""
    arguments = {"values": values, "factor": factor, "size": values.numel(), "BLOCK": _BLOCK}
    grid = (min(_PROGRAMS, triton.cdiv(values.numel(), _BLOCK)),)
    return Launch(rescale_kernel, grid, arguments, num_warps=8, fp_fusion=False)


def rescale_(values: Tensor, factor: Tensor) -> Tensor:
    """`reference.rescale_` as one launch. ``values`` contiguous; ``factor`` []. ValueError for a
    wrong device, dtype, shape or stride."""
    require_device(values=values, factor=factor)
    require_dtype(FLOATS, values=values, factor=factor)
    require_shape((), factor=factor)
    if not values.is_contiguous():
        raise ValueError(f"values must be contiguous, got strides {values.stride()}")
    run(plan_rescale(values, factor), values.device)
    return values
