"""Sources of randomness in a training model: dropout, and the noise of some routers.

With dropout a prompt would be encoded differently for each of its responses, and the second phase
of two-phase training would differentiate a function other than the one scored in the first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

# Plain numbers beside dropout rates that make a forward pass random: noise on a router's inputs
# (Mixtral, DBRX, PhiMoE), skipped layers (OPT, Bart), noise on embeddings (NEFTune).
_NOISE = ("jitter", "layerdrop", "neftune_noise_alpha")


def disable_dropout(model: nn.Module) -> list[str]:
    """Set every dropout rate of a model to 0; return the changes, each as ``"name: 0.1"``.

    Covers ``nn.Dropout`` modules (LoRA's too) and the rates that attention modules keep as plain
    numbers. The configuration is left alone: it records how the model was made.
    """
    changed: list[str] = []
    for module, name, label, value in _dropouts(model):
        changed.append(f"{label}: {value}")
        setattr(module, name, 0.0)
    return changed


def random_rates(model: nn.Module) -> list[str]:
    """Every nonzero rate of dropout or other noise, as ``"name: 0.1"``."""
    dropouts = [f"{label}: {value}" for _, _, label, value in _dropouts(model)]
    noise = [
        f"{path}.{name}: {value}"
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if any(word in name for word in _NOISE) and isinstance(value, (int, float)) and value > 0
    ]
    return dropouts + noise


def _dropouts(model: nn.Module) -> Iterator[tuple[nn.Module, str, str, float]]:
    """Module, attribute, full name and value of every dropout rate above 0."""
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            if module.p > 0:
                yield module, "p", path, module.p
            continue
        for name, value in list(vars(module).items()):
            if "dropout" in name and _is_rate(value):
                yield module, name, f"{path}.{name}", value


def _is_rate(value: Any) -> bool:
    return isinstance(value, float) and 0.0 < value <= 1.0
