"""How many matrix products of the workload's size a run makes, counted from what it calls.

The profiler sees the vendor library's products wherever they are called from, inside operators and
backwards too. Products inside a peer's own kernels are not seen, and are reported as unknown.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

# The profiler's library announces every start on stderr unless told not to before it is loaded.
os.environ.setdefault("KINETO_LOG_LEVEL", "5")

from torch.profiler import ProfilerActivity, profile  # noqa: E402

_FIRST_MATRIX = {"aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::baddbmm": 1}


def count(step: Callable[[], Any], product_flops: int) -> float | None:
    """Operations of the run's matrix products over those of one; None if there were none."""
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
