"""How far a float32 kernel may be from float64: derived from the data, not from a CPU's ``exp``.

A GPU's exponential and division are approximations, each within two units in the last place, and a
softcap multiplies what its quotient of exponentials has lost by the cap: several 1e-6 at 30. So a
budget is a number of units in the last place of a row's largest final logit ``z`` (float64, exact;
infinite ones have no error).
"""

from __future__ import annotations

from torch import Tensor

UNIT = 2.0**-23
"""One unit in the last place of a float32 between 1 and 2."""


def largest_logit(z: Tensor) -> Tensor:
    """[rows] largest finite magnitude of a row of final logits [rows, V], and at least 1."""
    return z.abs().nan_to_num(0.0, 0.0, 0.0).amax(-1).clamp_min(1.0)


def logits_error(z: Tensor, softcap: float | None) -> Tensor:
    """[rows] error of final logits: roundings of bias and scale; under a softcap those of two
    exponentials, a division and the factors around them."""
    return (1 if softcap is None else 6) * UNIT * largest_logit(z)


def log_probability_error(z: Tensor, softcap: float | None) -> Tensor:
    """[rows] error of a log-sum-exp or a log-probability: of a logit twice, of their difference,
    and of a logarithm."""
    return 2 * logits_error(z, softcap) + 2 * UNIT * largest_logit(z) + 4 * UNIT


def gradient_error(
    z: Tensor, softcap: float | None, coefficients: Tensor, logit_scale: float = 1.0
) -> Tensor:
    """[rows] error of ``coefficient * (onehot - p)``: a probability is at most 1, and its relative
    error is the error of its logarithm. An exponent's own rounding counts little, because
    ``p * log(p)`` is bounded."""
    relative = logits_error(z, softcap) + 0.5 * UNIT * largest_logit(z) + 4 * UNIT
    return coefficients.abs() * relative * abs(logit_scale)
