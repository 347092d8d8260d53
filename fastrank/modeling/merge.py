"""Adapters merged into the weights they adapt: a plain model, as every other command takes it.

Merging adds an adapter's change to the base weight in place. Where input and output embeddings are
one tensor, a change meant for one of them would reach the other, and a checkpoint that says "tied"
would drop one of the two: such embeddings are separated first.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel


def merge_adapter(model: Any) -> PreTrainedModel:
    """The base model of a ``PeftModel`` with its active adapter merged in; the ``PeftModel`` is
    used up.

    Raises:
        ValueError: the merged weights are not finite.
    """
    base: PreTrainedModel = model.get_base_model()
    _untie_adapted(base)
    merged: PreTrainedModel = model.merge_and_unload(safe_merge=True)
    return merged


def _untie_adapted(base: PreTrainedModel) -> None:
    """Give the head a weight of its own if it shares one with the embedding and either of them is
    adapted or trained as a copy."""
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
    """The module that an adapter or a trained copy was put around."""
    if hasattr(module, "get_base_layer"):
        return module.get_base_layer()
    return getattr(module, "original_module", module)
