"""Models for the step suite: the shapes of known ones, with random weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from fastrank.errors import InputError


@dataclass(frozen=True)
class Shape:
    """What a causal language model's cost depends on."""

    family: str
    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    tied: bool


SHAPES = {
    "qwen2.5-0.5b": Shape("qwen2", 151936, 896, 24, 14, 2, 64, 4864, True),
    "llama-3.2-1b": Shape("llama", 128256, 2048, 16, 32, 8, 64, 8192, True),
    "llama-6x256": Shape("llama", 32000, 256, 6, 8, 8, 32, 1024, False),
    "llama-4x128": Shape("llama", 8192, 128, 4, 4, 4, 32, 512, False),
    "llama-2x32": Shape("llama", 512, 32, 2, 4, 2, 8, 64, False),
}

_FAMILIES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
}


def build_model(name: str, dtype: torch.dtype, device: torch.device, seed: int) -> PreTrainedModel:
    """The model in training mode (it has no dropout); the same seed gives the same weights in every
    dtype.

    Raises:
        InputError: no such shape.
    """
    if name not in SHAPES:
        raise InputError(f"model must be one of {', '.join(SHAPES)}, got {name!r}")
    shape = SHAPES[name]
    make_config, make_model = _FAMILIES[shape.family]
    config = make_config(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_size,
        intermediate_size=shape.intermediate,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=8192,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        with torch.device(device):
            model: PreTrainedModel = make_model(config)
    torch.nn.Module.to(model, dtype)
    return model.train()
