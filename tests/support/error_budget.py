"""How far a float32 kernel may be from float64: derived from the data, not from a CPU's ``exp``.

A GPU's exponential and division are approximations, each within two units in the last place, and a
softcap multiplies what its quotient of exponentials has lost by the cap: several 1e-6 at 30. So a
budget is a number of units in the last place of a row's largest final logit ``z`` (float64, exact;
infinite ones have no error).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

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


# What a few roundings one after the other come to, of a number or of an exponential's argument.
ROUNDINGS = 8
# What a device approximates, as torch spells it.
_APPROXIMATED = {
    getattr(where, name)
    for where in (torch, Tensor, torch.nn.functional)
    for name in ("exp", "exp2", "log", "log1p", "sigmoid", "softmax", "log_softmax", "logsigmoid")
    if hasattr(where, name)
}


class _Disturbing(TorchFunctionMode):
    """Elementary functions whose results are off, each number by up to ``units`` units in the last
    place of a float32."""

    def __init__(self, units: float) -> None:
        super().__init__()
        self.units = units
        self.generator = torch.Generator().manual_seed(0)

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        return self.disturb(result) if function in _APPROXIMATED else result

    def disturb(self, x: Tensor) -> Tensor:
        signs = 2 * torch.rand(x.shape, generator=self.generator, dtype=torch.float64) - 1
        return x.double() * (1 + self.units * UNIT * signs.to(x.device))


def shifts(
    compute: Callable[[Callable[[Tensor], Tensor]], Sequence[Tensor]],
    units: float = ROUNDINGS,
    probes: int = 3,
) -> list[Tensor]:
    """How far each result moves, number by number, when inputs and elementary functions are off by
    roundings.

    ``compute`` gives float64 results from inputs that it passes through its argument. The largest
    distance of a few random disturbances says what the data's conditioning makes of an error, where
    no formula for it is at hand; nothing is said of numbers that are not finite.
    """
    exact = [x.detach() for x in compute(lambda x: x.detach().double())]
    largest = [torch.zeros_like(x) for x in exact]
    disturbing = _Disturbing(units)
    for _ in range(probes):
        with disturbing:
            moved = compute(lambda x: disturbing.disturb(x.detach()))
        for i, (new, old) in enumerate(zip(moved, exact, strict=True)):
            distance = (new.detach() - old).abs().nan_to_num(0.0, 0.0, 0.0)
            largest[i] = torch.maximum(largest[i], distance)
    return largest


class Exact(NamedTuple):
    """A float64 result, and how far a float32 one may be: what roundings of its inputs and of
    elementary functions come to, twice, because a few random ones are not the worst."""

    value: Tensor
    error: Tensor


def within_roundings(
    compute: Callable[[Callable[[Tensor], Tensor]], Sequence[Tensor]],
) -> list[Exact]:
    """The exact results of a computation as for `shifts`, a named tuple if it gives one."""
    exact = compute(lambda x: x.detach().double())
    found = [Exact(x, 2 * shift) for x, shift in zip(exact, shifts(compute), strict=True)]
    return found if type(exact) is tuple else type(exact)(*found)


def assert_within(actual: Sequence[Tensor], expected: Sequence[Exact]) -> None:
    """Float32 against float64: NaN and infinities in the same places, the rest within the roundings
    of inputs and of terms as large as the largest result."""
    for ours, (exact, error) in zip(actual, expected, strict=True):
        assert ours.dtype == torch.float32 and ours.shape == exact.shape
        finite = exact.isfinite()
        torch.testing.assert_close(ours.double()[~finite], exact[~finite], equal_nan=True)
        if finite.any():
            largest = exact[finite].abs().max().clamp_min(1e-3)
            allowed = error[finite] + 2 * ROUNDINGS * UNIT * largest
            assert ((ours - exact)[finite].abs() <= allowed).all()
