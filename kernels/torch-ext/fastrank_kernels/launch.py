"""Triton launches, and the checks before them.

A launch is built as data (`Launch`) and run afterwards. That costs a tuple per call and buys two
things: the device is set in one place, and the tests compile ahead of time, without a GPU, exactly
the argument types and pinned configurations that would be launched.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs

# What the kernels read and compute in float32. float64 is served by the torch backend.
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32)


class Launch(NamedTuple):
    """One kernel launch: all arguments by name, compile-time ones too, and a pinned setting."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int
    fp_fusion: bool
    """Whether ``a * b + c`` may become one rounding. Its default changes between versions of
    triton, so every kernel states it."""
    max_registers: int | None = None
    """Registers per thread at most, on NVIDIA. Left to itself ptxas may spill a few to raise the
    occupancy; told the limit it uses what it may and spills nothing."""

    def options(self, *, nvidia: bool) -> dict[str, Any]:
        """The pinned configuration as triton's compiler options."""
        options = {"num_warps": self.num_warps, "enable_fp_fusion": self.fp_fusion}
        if nvidia and self.max_registers is not None:
            options["maxnreg"] = self.max_registers
        return options


def run(launch: Launch, device: torch.device) -> None:
    """Launch on ``device``, whichever device is current; an empty grid is nothing to do."""
    if 0 in launch.grid:
        return
    index = device.index if device.type == "cuda" else -1
    with torch.cuda.device(index):
        options = launch.options(nvidia=torch.version.hip is None)
        launch.kernel[launch.grid](**launch.arguments, **options)


def require_device(**tensors: Tensor | None) -> None:
    """The first tensor lives on a CUDA (or ROCm) device, and all the others on the same one.

    Under ``TRITON_INTERPRET=1`` a kernel runs in Python on the CPU, and CPU tensors are what it
    takes.
    """
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first = next(iter(given))
    device = given[first].device
    expected = "cpu" if knobs.runtime.interpret else "cuda"
    if device.type != expected:
        raise ValueError(
            f"{first} must be on a {expected} device for the triton backend, got {device}"
        )
    for name, tensor in given.items():
        if tensor.device != device:
            raise ValueError(f"{name} must be on {device} like {first}, got {tensor.device}")


def require_dtype(allowed: Iterable[torch.dtype], **tensors: Tensor | None) -> None:
    """Every tensor has one of the types; float64 is pointed to the backend that computes it."""
    names = tuple(allowed)
    for name, tensor in tensors.items():
        if tensor is None or tensor.dtype in names:
            continue
        wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in names)
        hint = "; backend='torch' computes in float64" if tensor.dtype == torch.float64 else ""
        got = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(f"{name} must be {wanted} for the triton backend, got {got}{hint}")


def require_shape(shape: tuple[int, ...], **tensors: Tensor | None) -> None:
    """Every tensor has exactly this shape."""
    for name, tensor in tensors.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")


def require_rows(**tensors: Tensor) -> None:
    """Every tensor is a matrix whose rows are contiguous; the row stride is free."""
    for name, tensor in tensors.items():
        if tensor.dim() != 2:
            raise ValueError(f"{name} must have shape [rows, V], got {tuple(tensor.shape)}")
        if tensor.shape[1] > 1 and tensor.stride(1) != 1:
            raise ValueError(f"{name} must have contiguous rows, got strides {tensor.stride()}")


def require_separate_rows(**tensors: Tensor) -> None:
    """No two rows of what is written share memory."""
    for name, tensor in tensors.items():
        if tensor.shape[0] > 1 and tensor.stride(0) < tensor.shape[1]:
            strides = tensor.stride()
            raise ValueError(f"{name} must have rows that do not overlap, got strides {strides}")


# Elements of a row up to which masks and pitches are rounded: 16 make any mask as wide as the
# widest access (eight 2-byte elements), and triton knows integers that 16 divides.
_MASK_STEP = 16


def read_end(matrix: Tensor) -> int:
    """Where a masked load of a row may end: the width rounded up to the step of vectorised masks,
    or just the width where the memory ends before. What lies between is read and not used."""
    rows, width = matrix.shape
    rounded = -(-width // _MASK_STEP) * _MASK_STEP
    end = matrix.storage_offset() + (rows - 1) * matrix.stride(0) + rounded
    return rounded if end * matrix.element_size() <= matrix.untyped_storage().nbytes() else width


def write_end(wide: Tensor, over: Tensor) -> int:
    """As `read_end` for stores into ``over``, a narrower matrix laid over the rows of ``wide``:
    it may end behind its own width as long as that is inside the wide row."""
    width = wide.shape[1]
    rounded = -(-width // _MASK_STEP) * _MASK_STEP
    fits = rounded * over.element_size() <= width * wide.element_size()
    return rounded if fits else width


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below ``number`` (1 for anything below 1)."""
    return 1 << max(number - 1, 0).bit_length()
