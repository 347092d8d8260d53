"""Which implementation computes an operator: plain torch, or Triton where it can run."""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Literal, get_args

import torch

Backend = Literal["torch", "triton"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)


def choose_backend(
    backend: str | None, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Backend, str]:
    """The backend's name and the reason for it; None leaves the choice to the device and to the
    dtype that is computed in.

    Raises:
        ValueError: an unknown name, or ``"triton"`` where it cannot run: never another one instead.
    """
    if backend == "torch":
        return "torch", "asked for"
    if backend == "triton":
        _require_triton(device, dtype)
        return "triton", "asked for"
    if backend is not None:
        raise ValueError(f"backend must be one of {BACKENDS} or None, got {backend!r}")
    if device.type == "cuda" and dtype == torch.float64:
        return "torch", "the kernels do not compute in float64"
    if device.type == "cuda":
        try:
            import_module("triton")
        except ImportError:
            return "torch", "triton is not installed"
        return "triton", "the tensors are on a GPU"
    return "torch", f"the tensors are on {device.type}"


def backend_module(
    backend: str | None, device: torch.device, dtype: torch.dtype = torch.float32
) -> ModuleType:
    """The module with the backend's functions: `reference`, or `triton_backend`."""
    name, _ = choose_backend(backend, device, dtype)
    return _load(".reference" if name == "torch" else ".triton_backend")


@cache
def _load(name: str) -> ModuleType:
    return import_module(name, __package__)


def _require_triton(device: torch.device, dtype: torch.dtype) -> None:
    try:
        import_module("triton")
    except ImportError as error:
        raise ValueError(
            f"backend='triton' expected an installed triton, got {error}; pip install triton"
        ) from error
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"backend='triton' expected CUDA tensors (or TRITON_INTERPRET=1), got {device.type}"
        )
    if dtype == torch.float64:
        raise ValueError(
            "backend='triton' expected float32, bfloat16 or float16, got float64; "
            "backend='torch' computes in float64"
        )
