"""Where a model runs for inference, and in which type: one rule for every command."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastrank.errors import InputError

if TYPE_CHECKING:
    import torch


def choose_device(name: str) -> torch.device:
    """The device of that name; ``"auto"`` is the first CUDA device, or the CPU without one.

    Raises:
        InputError: no device of that name, or not on this machine.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(
            f"--device must be auto, cpu or cuda[:index], got '{name[:40]}'"
        ) from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise InputError(f"--device {name}: {found} CUDA devices are here")
    return device


def choose_dtype(dtype: str, device: torch.device) -> tuple[str, str]:
    """(the type to load weights in, why): "auto" is the stored type, or float32 on a CPU."""
    if dtype != "auto":
        return dtype, "asked for"
    if device.type == "cpu":
        return "float32", "on a CPU"
    return "auto", "as stored"
