"""Switching dropout off, which exact gradients of a ranking need.

With dropout the same prompt would be encoded differently for each of its responses, and the second
phase of two-phase training would differentiate another function than the first one scored.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def disable_dropout(model: nn.Module) -> list[str]:
    """Set every dropout rate of a model to 0; returns what was changed, as ``"name: 0.1"``.

    Covers ``nn.Dropout`` modules (LoRA's too) and the rates that attention modules keep as plain
    numbers. The configuration is left alone: it says what the model was made with.
    """
    changed: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            if module.p > 0:
                changed.append(f"{path}: {module.p}")
                module.p = 0.0
            continue
        for name, value in list(vars(module).items()):
            if "dropout" in name and _is_rate(value):
                changed.append(f"{path}.{name}: {value}")
                setattr(module, name, 0.0)
    return changed


def _is_rate(value: Any) -> bool:
    return isinstance(value, float) and 0.0 < value <= 1.0
