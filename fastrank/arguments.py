"""Checks that several public functions share: choices, and dtype, shape and device of tensors.

Values (offsets, labels) are checked inside the operators, where a compiled step reaches them too.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

Reduction = Literal["mean", "sum", "none"]
HeadPathName = Literal["auto", "fused", "logits"]
Pooling = Literal["mean", "sum"]
Normalize = Pooling | float
"""How token log-probabilities become a score: their mean, their sum, or for a number α their sum
over ``|y|^α``."""

LARGEST = 1e15
"""Of numbers among the options: products and squares of them still are float32. The least positive
one is its inverse."""

_INDEX_DTYPES = (torch.int32, torch.int64)


def check_tensor(
    name: str,
    value: object,
    shape: tuple[int | str, ...],
    *,
    kind: Literal["floating", "int64", "offsets", "bool"] = "floating",
    device: torch.device | None = None,
) -> Tensor:
    """``value`` must be a tensor of ``shape`` (a string stands for any size), of a ``kind`` of
    dtype (``floating``, ``int64``, ``offsets``, ``bool``) and, if given, on ``device``.

    Raises:
        TypeError: it is no tensor or has another dtype.
        ValueError: it has another shape or lives elsewhere.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if kind == "floating":
        good = value.is_floating_point()
    elif kind == "offsets":
        good = value.dtype in _INDEX_DTYPES
    else:
        good = value.dtype == {"int64": torch.int64, "bool": torch.bool}[kind]
    if not good:
        wanted = "int32 (or int64)" if kind == "offsets" else kind
        raise TypeError(f"{name} must be {wanted}, got {value.dtype}")
    fits = value.dim() == len(shape) and all(
        isinstance(want, str) or want == got for want, got in zip(shape, value.shape, strict=True)
    )
    if not fits:
        expected = "[" + ", ".join(str(size) for size in shape) + "]"
        raise ValueError(f"{name} must have shape {expected}, got {list(value.shape)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} must be on {device}, got {value.device}")
    return value


def check_choice(name: str, value: object, choices: object) -> None:
    """``value`` must be one of a Literal's ``choices``, else ValueError."""
    if value not in get_args(choices):
        expected = ", ".join(repr(choice) for choice in get_args(choices))
        raise ValueError(f"{name} must be one of {expected}, got {value!r}")


def is_number(value: object) -> bool:
    """Whether ``value`` is a plain number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_count(name: str, value: object, *, least: int = 1) -> None:
    """``value`` must be an integer of at least ``least``, else TypeError or ValueError."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_normalize(name: str, value: object) -> None:
    """``value`` must be a `Normalize`, else ValueError."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        good = math.isfinite(value) and value >= 0
    else:
        good = value in get_args(Pooling)
    if good:
        return
    raise ValueError(f"{name} must be 'mean', 'sum' or a number >= 0, got {value!r}")


def length_exponent(normalize: Normalize) -> float:
    """α of a `Normalize`: 1 for the mean, 0 for the sum."""
    return {"mean": 1.0, "sum": 0.0}[normalize] if isinstance(normalize, str) else float(normalize)
