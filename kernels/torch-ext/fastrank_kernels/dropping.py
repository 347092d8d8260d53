"""Whether rows without a gradient are left out of the backward products.

A host learns how many rows are live by waiting for the device. On a CPU that costs nothing. On a
GPU the previous call's share decides instead, which was sent to the host as that call went on. The
same sequence of calls therefore decides the same way, and the first call of a process drops
nothing: after a resume a GPU's first step may differ from the unbroken run's by roundings, where
that one dropped rows.

Leaving rows out saves their part of two products. Its price is a second pass over the logits, where
otherwise one suffices (`unit_dlogits`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Floating-point operations in the time of a byte: 720 TFLOP/s and 3 TB/s on an H100.
_OPERATIONS_PER_BYTE = 240


class _Share(NamedTuple):
    live: Tensor
    """float32 [] in pinned memory."""
    arrived: torch.cuda.Event


_last: dict[torch.device, _Share] = {}


def pays(live_share: float, width: int) -> bool:
    """Whether leaving out the dead rows of logits made from hidden rows of a width is worth a
    second pass.

    Per logit, two products of ``2 · width`` operations are saved in dead rows. Read and written are
    4 bytes for statistics and 6 in live rows, instead of 6 in every row.

    >>> pays(0.85, 4096), pays(0.85, 896), pays(0.5, 896)
    (True, False, True)
    """
    saved = 4 * width * (1 - live_share)
    return saved > _OPERATIONS_PER_BYTE * max(0.0, 6 * live_share - 2)


def decide(device: torch.device, width: int) -> bool:
    """Whether this call looks for dead rows: always on a CPU, by the last call's share on a GPU."""
    if device.type != "cuda":
        return True
    last = _last.get(device)
    if last is None or torch.cuda.is_current_stream_capturing():
        return False
    last.arrived.synchronize()  # long past: the whole step after it has been queued since
    return pays(float(last.live), width)


def remember(coefficients: Tensor) -> None:
    """Send the share of live rows to the host, for the next call to decide by."""
    device = coefficients.device
    if device.type != "cuda" or not coefficients.numel():
        return
    if torch.cuda.is_current_stream_capturing():
        return
    share = (coefficients != 0).to(torch.float32).mean()
    live = torch.empty((), dtype=torch.float32, pin_memory=True)
    live.copy_(share, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(device))
    _last[device] = _Share(live, arrived)
