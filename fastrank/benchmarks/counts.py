"""Counts of the work in a run: matrix products, in units of the workload's own.

The profiler sees the vendor library's products wherever they are called from, also inside operators
and backward passes. Products inside a peer's own kernels are not seen, and are reported as unknown.
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.profiler import ProfilerActivity, profile

_FIRST_MATRIX = {
    "aten::mm": 0,
    "aten::bmm": 0,
    "aten::addmm": 1,
    "aten::addmm_": 1,
    "aten::baddbmm": 1,
    "aten::baddbmm_": 1,
}


def count_products(step: Callable[[], Any], product_flops: int) -> float | None:
    """Operations of the run's matrix products over those of one; None if there were none."""
    with _without_announcements():
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
            step()
    total = 0
    for event in profiler.events() or []:
        first = _FIRST_MATRIX.get(event.name)
        if first is None or _inside_product(event):
            continue
        left, right = event.input_shapes[first : first + 2]
        total += 2 * math.prod(left) * right[-1]
    return total / product_flops if total else None


def _inside_product(event: Any) -> bool:
    parent = event.cpu_parent
    while parent is not None:
        if parent.name in _FIRST_MATRIX:
            return True
        parent = parent.cpu_parent
    return False


@contextmanager
def _without_announcements() -> Iterator[None]:
    """Keep the lines in which the profiler's library announces its starts and stops out of stderr;
    everything else that is written there meanwhile follows at the end."""
    sys.stderr.flush()
    before = os.dup(2)
    with tempfile.TemporaryFile() as caught:
        os.dup2(caught.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(before, 2)
            os.close(before)
            caught.seek(0)
            for line in caught:
                if not line.startswith(b"USDT:"):
                    os.write(2, line)
