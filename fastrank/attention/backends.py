"""Which attention backend serves a layer, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from fastrank.attention.visibility import FULL, Visibility

BACKENDS = ("cpu", "varlen", "flex", "paths")


@dataclass(frozen=True)
class LayerProperties:
    """What a layer asks of its attention, beyond queries, keys and values.

    ``covered`` says that every path of the pack is shorter than the layer's window or chunk, which
    makes the layer an ordinary full one for this pack.
    """

    visibility: Visibility = FULL
    covered: bool = True
    softcap: bool = False
    sinks: bool = False
    head_size: int = 64
    value_size: int = 64


class Choice(NamedTuple):
    name: str
    reason: str


def choose_backend(
    device: torch.device, dtype: torch.dtype, layer: LayerProperties = LayerProperties()
) -> Choice:
    """The backend that ``attention="auto"`` takes for a layer, and the reason in words."""
    if device.type == "cpu":
        reason = _unsupported_by_cpu(dtype, layer)
        if reason:
            return Choice("paths", f"cpu: {reason}: every path by itself")
        return Choice("cpu", "cpu: parts of one softmax merged by log-sum-exp, no keys copied")
    return Choice("paths", f"no fused backend for {device.type}: every path by itself")


def check_backend(
    name: str, device: torch.device, dtype: torch.dtype, layer: LayerProperties
) -> None:
    """Raise ValueError if the backend asked for by name cannot serve the layer."""
    reason = None
    if name == "cpu":
        reason = (
            "it needs CPU tensors" if device.type != "cpu" else _unsupported_by_cpu(dtype, layer)
        )
    if reason:
        raise ValueError(
            f"attention={name!r} cannot serve a {layer.visibility} layer in {dtype} on "
            f"{device.type}: {reason}; use attention='auto'"
        )


def _unsupported_by_cpu(dtype: torch.dtype, layer: LayerProperties) -> str | None:
    if not layer.covered:
        return f"{layer.visibility} layer shorter than a path"
    if layer.softcap:
        return "soft-capped logits"
    return None
