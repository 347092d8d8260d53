"""Memory of the host: large buffers in pages of 2 MiB, and tensors on their way to a device.

A buffer that lives for one call is mapped anew by every call, and touching it page by page, 4 KiB
each, costs several percent of the matrix products that fill it. Linux gives larger pages on request
(``madvise``); elsewhere the buffer is an ordinary one.
"""

from __future__ import annotations

import ctypes
import math
import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor

_HUGE_PAGE = 2 << 20
_MADV_HUGEPAGE = 14
# Smaller blocks come from memory that the process has touched before.
_SMALLEST = 32 << 20


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As ``torch.empty``; on a Linux host a large tensor asks for large pages."""
    out = torch.empty(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    if device.type == "cpu" and size >= _SMALLEST and (advise := _madvise()) is not None:
        first = -(-out.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
        last = (out.data_ptr() + size) // _HUGE_PAGE * _HUGE_PAGE
        advise(first, last - first, _MADV_HUGEPAGE)  # a refusal changes nothing
    return out


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``, without waiting for it where it comes from the host.

    From pageable memory a copy to a GPU may wait for all that is queued there, so it is pinned
    first. Nothing is copied that is there already; what comes *to* the host is waited for.
    """
    if tensor.device == device:
        return tensor
    if tensor.device.type != "cpu":
        return tensor.to(device)
    if torch.compiler.is_compiling():
        return tensor.to(device, non_blocking=True)
    if device.type == "cuda" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@cache
def _madvise() -> Any:
    """The C library's function, or None without one."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        function = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    function.restype = ctypes.c_int
    return function
