"""Which attention backend serves a layer, and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from fastrank.attention.varlen import MAX_HEAD_SIZE, flash_attn_installed, torch_varlen
from fastrank.attention.visibility import FULL, Visibility


@dataclass(frozen=True)
class LayerProperties:
    """What a layer asks of its attention, beyond queries, keys and values.

    ``covered`` says that no sequence of the pack is longer than the layer's window or chunk, which
    makes the layer an ordinary full one for this pack.
    """

    visibility: Visibility = FULL
    covered: bool = True
    softcap: bool = False
    sinks: bool = False
    head_size: int = 64
    value_size: int = 64

    @classmethod
    def of(
        cls, visibility: Visibility, longest_sequence: int, **properties: Any
    ) -> LayerProperties:
        """The properties of a layer for a pack whose longest sequence has this many tokens."""
        return cls(visibility, visibility.covers(longest_sequence), **properties)


class Choice(NamedTuple):
    name: str
    reason: str


def choose_attention(
    device: torch.device, dtype: torch.dtype, layer: LayerProperties = LayerProperties()
) -> Choice:
    """The backend that ``attention="auto"`` takes for a layer, and the reason in words."""
    missing: list[str] = []
    for name in _PREFERENCE:
        reason = BACKENDS[name](device, dtype, layer)
        if reason is None:
            found = f"; not {', '.join(missing)}" if missing else ""
            return Choice(name, _ABOUT[name] + found)
        if name in ("varlen", "flex") and device.type != "cuda":
            continue
        if name != "cpu" or device.type == "cpu":
            missing.append(f"{name} ({reason})")
    raise AssertionError("the segmentwise backend serves every layer")


def check_backend(
    name: str, device: torch.device, dtype: torch.dtype, layer: LayerProperties
) -> None:
    """Raise ValueError if the backend asked for by name cannot serve the layer."""
    reason = BACKENDS[name](device, dtype, layer)
    if reason is not None:
        raise ValueError(
            f"attention={name!r} cannot serve a {layer.visibility} layer in {dtype} on "
            f"{device.type}: {reason}; use attention='auto'"
        )


def _cpu(device: torch.device, dtype: torch.dtype, layer: LayerProperties) -> str | None:
    if device.type != "cpu":
        return "needs CPU tensors"
    if not layer.covered:
        return f"{layer.visibility} is shorter than a sequence"
    return "soft-capped logits" if layer.softcap else None


def _varlen(device: torch.device, dtype: torch.dtype, layer: LayerProperties) -> str | None:
    if device.type != "cuda":
        return "needs a CUDA device"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"{dtype} is neither float16 nor bfloat16"
    if max(layer.head_size, layer.value_size) > MAX_HEAD_SIZE:
        return f"heads larger than {MAX_HEAD_SIZE}"
    if layer.sinks:
        return "attention sinks"
    if layer.visibility.kind == "chunked" and not layer.covered:
        return f"{layer.visibility} is shorter than a sequence"
    if not flash_attn_installed():
        if layer.softcap:
            return "soft-capped logits need flash-attn"
        if torch_varlen() is None:
            return "this PyTorch has no varlen_attn, and flash-attn is not installed"
    return None


def _flex(device: torch.device, dtype: torch.dtype, layer: LayerProperties) -> str | None:
    if device.type != "cuda":
        return "needs a CUDA device"
    return "float64" if dtype == torch.float64 else None


def _segmentwise(device: torch.device, dtype: torch.dtype, layer: LayerProperties) -> str | None:
    return None


# Each says why it cannot serve a layer; None where it can.
BACKENDS: dict[
    str, Callable[[torch.device, torch.dtype, LayerProperties], str | None]
] = {"cpu": _cpu, "varlen": _varlen, "flex": _flex, "segmentwise": _segmentwise}  # fmt: skip

_PREFERENCE = ("cpu", "varlen", "flex", "segmentwise")

_ABOUT = {
    "cpu": "parts of one softmax merged by log-sum-exp, no keys copied",
    "varlen": "one variable-length flash kernel on gathered keys",
    "flex": "FlexAttention with blocks built from the segments",
    "segmentwise": "every sequence by itself",
}
