"""The correctness gate: what is wrong is not timed.

The error of a result is ‖x − x₆₄‖ / ‖x₆₄‖ against a float64 evaluation from the same inputs; the
limits are `problem.LIMITS`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .problem import Outputs

_CHUNK = 1 << 26


class Verdict(NamedTuple):
    """Errors by the result's name, and what is wrong (None: nothing)."""

    errors: dict[str, float]
    wrong: str | None

    @property
    def error(self) -> float:
        """The largest error."""
        return max(self.errors.values())


def judge(outputs: Outputs, reference: Outputs, limit: float) -> Verdict:
    """Hold every result of the reference against the one of the same name."""
    errors = {
        name: relative_error(outputs[name], expected) if name in outputs else math.inf
        for name, expected in reference.items()
    }
    name = max(errors, key=lambda key: errors[key])
    if errors[name] <= limit:
        return Verdict(errors, None)
    return Verdict(errors, f"{name} is off by {errors[name]:.1e} (limit {limit:.0e})")


def relative_error(value: Tensor, expected: Tensor) -> float:
    """‖value − expected‖ / ‖expected‖ in float64; infinite for another shape or a NaN."""
    if value.shape != expected.shape:
        return math.inf
    expected, value = expected.detach().reshape(-1), value.detach().reshape(-1)
    off = torch.zeros((), dtype=torch.float64, device=expected.device)
    size = off.clone()
    for a, b in zip(value.split(_CHUNK), expected.split(_CHUNK), strict=True):
        off += (a.to(b.device).double() - b.double()).square().sum()
        size += b.double().square().sum()
    error = (off.sqrt() / size.sqrt()).item() if size.item() else off.sqrt().item()
    return error if math.isfinite(error) else math.inf
