"""Merging of adapters into the weights they adapt, which gives a plain model.

Merging adds an adapter's update to the base weight in place. Where input and output embeddings
share one tensor, an update meant for one of them would reach the other, and a checkpoint marked as
tied would drop one of the two: such embeddings are untied first.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel


def merge_adapter(model: Any) -> PreTrainedModel:
    """Merge the active adapter of a ``PeftModel`` into its base model and return that.

    The ``PeftModel`` is unusable afterwards.

    Raises:
        ValueError: the merged weights are not finite.
    """
    base: PreTrainedModel = model.get_base_model()
    _untie_adapted(base)
    merged: PreTrainedModel = model.merge_and_unload(safe_merge=True)
    return merged


def _untie_adapted(base: PreTrainedModel) -> None:
    """Untie the head from the embedding if either is adapted or trained as a copy."""
    modules: list[Any] = [base.get_input_embeddings(), base.get_output_embeddings()]
    inner = [_original(module) for module in modules]
    if inner[0].weight is not inner[1].weight:
        return
    if all(own is module for own, module in zip(inner, modules, strict=True)):
        return
    inner[1].weight = nn.Parameter(inner[1].weight.detach().clone(), requires_grad=False)
    for config in {id(c): c for c in (base.config, base.config.get_text_config())}.values():
        config.tie_word_embeddings = False
    base.all_tied_weights_keys = {}


def _original(module: Any) -> Any:
    """The module that an adapter or a trained copy wraps."""
    if hasattr(module, "get_base_layer"):
        return module.get_base_layer()
    return getattr(module, "original_module", module)
