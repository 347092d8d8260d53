"""The causal language model inside its wrappers (DDP, torch.compile, PEFT), and its parts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig, PreTrainedModel

from fastrank.attention.gate import trunk
from fastrank.errors import InputError


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DDP (DeepSpeed's engine names it alike) and ``torch.compile``."""
    for name in ("module", "_orig_mod"):
        inner = getattr(model, name, None)
        if isinstance(inner, nn.Module):
            return unwrap(inner)
    return model


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model itself, or the one that PEFT wraps.

    Raises:
        TypeError: the model is neither a transformers model nor PEFT-wrapped.
        InputError: its PEFT method cannot be supported, or it has no output head.
    """
    inner: Any = model
    if hasattr(inner, "get_base_model"):
        _check_peft(inner)
        inner = inner.get_base_model()
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(
            "model must be a transformers causal language model, PEFT-wrapped or not, got "
            f"{type(inner).__name__}"
        )
    if getattr(inner.config, "is_encoder_decoder", False):
        raise InputError(
            f"{type(inner).__name__} is an encoder-decoder model; expected a causal language model"
        )
    if inner.get_output_embeddings() is None or trunk(inner) is inner:
        raise InputError(
            f"{type(inner).__name__} has no language-model head; expected a causal language model"
        )
    return inner


def _check_peft(model: Any) -> None:
    for peft_config in getattr(model, "peft_config", {}).values():
        if getattr(peft_config, "is_prompt_learning", False):
            raise InputError(
                f"PEFT method {peft_config.peft_type} puts virtual tokens before the prompt, which "
                "fastrank does not support; expected one that adapts weights, such as LoRA"
            )
        if getattr(peft_config, "alora_invocation_tokens", None):
            raise InputError(
                "activated LoRA (alora_invocation_tokens) adapts single positions of a row, which "
                "fastrank does not support; expected LoRA on every position"
            )


def vocab_size(model: PreTrainedModel) -> int:
    """Number of token ids that the model can embed."""
    embedding: Any = model.get_input_embeddings()
    return int(getattr(embedding, "num_embeddings", None) or embedding.weight.shape[0])


def model_configs(model: nn.Module) -> list[PretrainedConfig]:
    """Every configuration from which a module reads its attention implementation."""
    configs: dict[int, PretrainedConfig] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PretrainedConfig):
            configs[id(config)] = config
    return list(configs.values())


def is_materialized(model: nn.Module) -> bool:
    """Whether every weight holds its data: none on the meta device, sharded or emptied."""
    return all(
        parameter.numel() > 0 and not parameter.is_meta and not isinstance(parameter, DTensor)
        for parameter in model.parameters()
    )


def keep_differentiable(model: nn.Module) -> None:
    """Keep bitsandbytes' 4-bit layers from repacking their weights.

    On a CPU with bfloat16 instructions a layer's first forward pass in evaluation mode, without
    gradients, changes its weight for good to a layout whose product has no gradient by its input:
    training would go on with wrong gradients, without an error.

    Raises:
        InputError: weights are repacked already, and something is to be trained.
    """
    trained = any(parameter.requires_grad for parameter in model.parameters())
    for name, module in model.named_modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            state: Any = getattr(module.weight, "quant_state", None)
            if trained and getattr(state, "packing_format_for_cpu", False):
                raise InputError(
                    f"the 4-bit weight of {name} was repacked by a forward pass in evaluation "
                    "mode, and no gradient passes it: load the model anew, and prepare it first"
                )
            module.support_avx512bf16_for_cpu = False


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode; restore every module's mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
