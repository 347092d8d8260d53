"""Checks of values: offsets, labels and rewards.

They run inside the operators, on the host, so that they also hold in a compiled step. A message
names the argument, the expected and the given value.
"""

from __future__ import annotations

import math

from torch import Tensor

#: Largest reward. Squares of differences of such ones, summed over a group, still are float32.
LARGEST_REWARD = 1e16


def check_offsets(name: str, offsets: Tensor, total: int, what: str, *, allow_empty: bool) -> None:
    """``offsets`` must rise from 0 to ``total``, strictly unless ``allow_empty``.

    Raises:
        ValueError: they do not. A CUDA tensor is copied to the host first (one synchronisation).
    """
    values = offsets.tolist()
    if not values:
        raise ValueError(f"{name} must hold at least the offset 0, got an empty tensor")
    if values[0] != 0:
        raise ValueError(f"{name} must begin at 0, got {values[0]}")
    if values[-1] != total:
        raise ValueError(f"{name} must end at {total} (number of {what}), got {values[-1]}")
    for i in range(1, len(values)):
        if values[i] < values[i - 1] or (values[i] == values[i - 1] and not allow_empty):
            kind = "not fall" if allow_empty else "rise"
            raise ValueError(
                f"{name} must {kind}, got {values[i - 1]} then {values[i]} at position {i}"
            )


def check_range(name: str, values: Tensor, stop: int, what: str) -> None:
    """All ``values`` must lie in ``[0, stop)``.

    Raises:
        ValueError: one does not; its position is named.
    """
    if not values.numel():
        return
    low, high = values.aminmax()
    if int(low) >= 0 and int(high) < stop:
        return
    wrong = ((values < 0) | (values >= stop)).nonzero()[0]
    at = int(wrong[0])
    raise ValueError(
        f"{name} must lie in [0, {stop}) ({what}), got {int(values[at])} at index {at}"
    )


def check_rewards(values: Tensor) -> None:
    """Rewards must be finite and at most `LARGEST_REWARD`: NaN is neither above nor below any other
    and would silently drop out of a ranking, and differences of infinite ones are NaN, as is what
    becomes of sums and squares of very large ones in float32.

    Raises:
        ValueError: one is; its position is named.
    """
    if not values.numel():
        return
    low, high = values.aminmax()  # NaN if there is one
    if -LARGEST_REWARD <= float(low) and float(high) <= LARGEST_REWARD:
        return
    values = values.reshape(-1)
    at = int((~(values.abs() <= LARGEST_REWARD)).nonzero()[0])
    value = float(values[at])
    kind = f"lie within ±{LARGEST_REWARD:g}" if math.isfinite(value) else "be finite"
    raise ValueError(f"rewards must {kind}, got {value} at index {at}")
