"""The check whether a model may share prompts.

A shared-prompt pack is exact only where every mixing of tokens goes through an attention function
that the adapter replaces, on positions that the model takes from ``position_ids``. Models that do
otherwise are refused by name, before they are silently wrong: recurrent and hybrid models (their
state would run from one response into the next), convolutions over time, biases by packed index
(ALiBi), encoders, attention dropout. All of them work with ``shared_prompts=False``, one row per
response.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from fastrank.attention.adapter import attention_modules, global_names
from fastrank.errors import InputError
from fastrank.hf_private import attention_implementation, has_attention_interface

LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention")

_RECURRENT = re.compile(
    "Mamba|SSM|Recurrent|Rwkv|RWKV|DeltaNet|LinearAttention|LightningAttention|LSTM"
)

# Their attention builds positions from packed indices, and the adapter corrects for it.
_CORRECTED = ("Llama4TextAttention",)


def check_shareable(causal_lm: PreTrainedModel) -> None:
    """Raise InputError if shared prompts would not be exact on this model; the text says why."""
    reason = refusal(causal_lm)
    if reason:
        raise InputError(
            f"{type(causal_lm).__name__} cannot share prompts: {reason}; use shared_prompts=False "
            "(one padded row per response)"
        )


def refusal(causal_lm: PreTrainedModel) -> str | None:
    """Why shared prompts would not be exact on this model; None if they are."""
    config = causal_lm.config.get_text_config()
    return (
        _refused_by_config(config)
        or _refused_by_layer_types(config)
        or _refused_by_modules(text_decoder(causal_lm))
        or _refused_by_interface(causal_lm)
        or _attention_dropout(text_decoder(causal_lm))
    )


def trunk(causal_lm: PreTrainedModel) -> nn.Module:
    """The model without its head: token ids in, last hidden states out."""
    inner: nn.Module = causal_lm.base_model
    if inner is causal_lm:  # where the prefix in checkpoints is not the attribute's name
        inner = getattr(causal_lm, "model", causal_lm)
    return inner


def text_decoder(causal_lm: PreTrainedModel) -> nn.Module:
    """The part of the trunk that reads tokens; of models that take text alone, all of it. The
    layers of a vision or audio tower are never run on text."""
    if causal_lm.config.get_text_config() is causal_lm.config:
        return trunk(causal_lm)
    decoder: nn.Module = causal_lm.get_decoder()
    return decoder


def _refused_by_config(config: PretrainedConfig) -> str | None:
    if not getattr(config, "is_causal", True):
        return "its attention is not causal (config.is_causal is False)"
    position_type = getattr(config, "position_embedding_type", None)
    if getattr(config, "alibi", False) or position_type == "alibi":
        return "its ALiBi biases count packed indices, not positions"
    softcap = getattr(config, "attn_logit_softcapping", None)
    if softcap and attention_implementation(config) == "sdpa":
        return (
            "PyTorch's attention leaves out its soft cap (load it with attn_implementation='eager')"
        )
    return None


def _refused_by_layer_types(config: PretrainedConfig) -> str | None:
    for attribute in ("layer_types", "layers_block_type"):
        layer_types = getattr(config, attribute, None)
        if layer_types is None:
            continue
        others = sorted({str(t) for t in layer_types} - {*LAYER_TYPES, "attention"})
        if others:
            return f"it is recurrent or hybrid (layers of type {', '.join(others)})"
    return None


def _refused_by_modules(decoder: nn.Module) -> str | None:
    for module in decoder.modules():
        name = type(module).__name__
        if _RECURRENT.search(name):
            return f"it is recurrent or hybrid (it contains {name})"
        if isinstance(module, nn.Conv1d):
            return "it contains a convolution over time (Conv1d)"
        if isinstance(module, nn.RNNBase):
            return f"it is recurrent (it contains {name})"
    return None


def _refused_by_interface(causal_lm: PreTrainedModel) -> str | None:
    modules = attention_modules(text_decoder(causal_lm))
    if not has_attention_interface(causal_lm) or not modules:
        return "its attention does not go through transformers' attention interface"
    if "position_ids" not in inspect.signature(trunk(causal_lm).forward).parameters:
        return "it takes no position_ids"
    num_layers = getattr(causal_lm.config.get_text_config(), "num_hidden_layers", None)
    if num_layers is not None and len(modules) < num_layers:
        return "it has layers without attention"
    for cls in {type(module) for module in modules}:
        if cls.__name__ not in _CORRECTED and "arange" in global_names(cls):
            return f"its {cls.__name__} counts packed indices, not positions"
    return None


def _attention_dropout(decoder: nn.Module) -> str | None:
    for name, rate in attention_dropouts(decoder):
        if rate > 0:
            return (
                f"attention dropout must be 0, got {name} = {rate} (disable_dropout(model) sets it)"
            )
    return None


def attention_dropouts(model: nn.Module) -> Iterator[tuple[str, float]]:
    """Name and value of every attention dropout rate of the model."""
    for module in attention_modules(model):
        for name, value in vars(module).items():
            if "dropout" in name and "resid" not in name and isinstance(value, float):
                yield f"{type(module).__name__}.{name}", value
        for name, child in module.named_children():
            if isinstance(child, nn.Dropout) and "resid" not in name:
                yield f"{type(module).__name__}.{name}", child.p
