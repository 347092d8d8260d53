"""Small configurations of transformers' architectures, by model type."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

VOCAB = 61

# Applied where a configuration has the field. Windows and chunks are shorter than the paths.
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "attention_dropout": 0.0,
    "dropout": 0.0,
    "sliding_window": 5,
    "attention_chunk_size": 5,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}

MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 6,
    "num_key_value_heads": 4,
    "head_dim": ...,
}
GPT2 = {
    "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
    "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
}  # fmt: skip
SLIDING = {"layer_types": ["sliding_attention", "full_attention"]}

# Exact with shared prompts. ``...`` leaves a field of COMMON at its default.
SHAREABLE: dict[str, dict[str, Any]] = {
    "apertus": {},
    "arcee": {},
    "bitnet": {},
    "cohere": {"logit_scale": 0.0625},
    "cohere2": SLIDING,
    "deepseek_v2": MLA,
    "deepseek_v3": MLA,
    "ernie4_5": {},
    "exaone4": SLIDING,
    "gemma": {},
    "gemma2": {**SLIDING, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma3_text": SLIDING,
    "glm": {},
    "glm4": {},
    "gpt2": GPT2,
    "gpt_bigcode": GPT2,
    "gpt_neox": {"hidden_dropout": 0.0},
    "gpt_oss": SLIDING,
    "granite": {"logits_scaling": 8.0, "attention_multiplier": 0.3, "residual_multiplier": 0.5},
    "granitemoe": {"logits_scaling": 4.0},
    "helium": {},
    "hyperclovax": {"logits_scaling": 4.0},
    "llama": {"tie_word_embeddings": True, "attention_bias": True},
    "llama4_text": {
        "layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0],
        "attn_temperature_tuning": True, "floor_scale": 3, "attn_scale": 0.3,
    },
    "minicpm3": MLA,
    "ministral": SLIDING,
    "mistral": {},
    "mixtral": {},
    "nanochat": {},
    "nemotron": {"num_key_value_heads": 4},
    "olmo": {},
    "olmo2": {},
    "olmo3": SLIDING,
    "olmoe": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16, "activation_dropout": 0.0},
    "persimmon": {"hidden_dropout": 0.0},
    "phi": {"resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "phi3": {"resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "phimoe": {},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1},
    "qwen2_moe": {"shared_expert_intermediate_size": 16},
    "qwen3": {},
    "qwen3_moe": {},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {"residual_dropout": 0.0, "embedding_dropout": 0.0},
    "vaultgemma": {**SLIDING, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0},
}  # fmt: skip

# Refused with shared prompts, exact without: (what the refusal says, fields).
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("attention interface", {"n_layer": 2, "n_head": 4}),
    "falcon_h1": ("recurrent or hybrid", {"mamba_d_ssm": 32, "mamba_n_heads": 4,
        "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}),
    "gptj": ("attention interface", {**GPT2, "rotary_dim": 4}),
    "jamba": ("recurrent or hybrid", {"attn_layer_period": 2, "attn_layer_offset": 1,
        "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 8,
        "mamba_dt_rank": 4, "use_mamba_kernels": False}),
    "lfm2": ("conv", {"layer_types": ["conv", "full_attention"]}),
    "mamba": ("recurrent or hybrid", {"state_size": 8, "time_step_rank": 4}),
    "mpt": ("attention interface", {"d_model": 32, "n_heads": 4, "n_layers": 2,
        "max_seq_len": 64, "expansion_ratio": 2}),
    "qwen3_next": ("recurrent or hybrid", {"layer_types": ["linear_attention", "full_attention"],
        "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "shared_expert_intermediate_size": 16}),
    "rwkv": ("recurrent or hybrid", {"attention_hidden_size": 32}),
}  # fmt: skip
if Version(version("transformers")) >= Version("5.24"):  # GPT-J has the interface from here on
    SHAREABLE["gptj"] = REFUSED.pop("gptj")[1]

# They compute the softmax or the rotation in float32, whatever the model's dtype.
FLOAT32_INSIDE = ("gemma2", "llama4_text", "vaultgemma")


#: Models of images and text, exact with shared prompts on text: (of the text, of the images).
WITH_IMAGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gemma3": (SLIDING, {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 28, "patch_size": 14, "attention_dropout": 0.1}),
    "mistral3": ({"model_type": "mistral"}, {"hidden_size": 32, "intermediate_size": 32,
        "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}),
    "qwen2_5_vl": ({"head_dim": ..., "rope_parameters": {"rope_type": "default",
        "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}},
        {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2,
         "out_hidden_size": 32}),
}  # fmt: skip


def build_with_images(model_type: str) -> PreTrainedModel:
    """A model of images and text with random weights, in evaluation mode."""
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {model_type}")
    config_class = CONFIG_MAPPING[model_type]
    text, images = WITH_IMAGES[model_type]
    fields = {name: COMMON[name] for name in list(COMMON)[:13]} | {"sliding_window": 5} | text
    fields = {name: value for name, value in fields.items() if value is not ...}
    torch.manual_seed(0)
    config = config_class(text_config=fields, vision_config=images)
    return AutoModelForImageTextToText.from_config(config).eval()


def build(
    model_type: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changed: Any
) -> PreTrainedModel:
    """A model with random weights, in evaluation mode, experts in plain products.

    ``changed`` are configuration fields that differ from the tables above. Skips the test where
    this transformers does not know the architecture.
    """
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {model_type}")
    config_class = CONFIG_MAPPING[model_type]
    known = config_class()
    fields = {name: value for name, value in COMMON.items() if hasattr(known, name)}
    fields |= SHAREABLE.get(model_type) or REFUSED.get(model_type, ("", {}))[1]
    fields |= changed
    torch.manual_seed(seed)
    config = config_class(**{name: value for name, value in fields.items() if value is not ...})
    # Older versions of transformers take PyTorch's attention for them, which drops the soft cap.
    options = {"attn_implementation": "eager"} if "attn_logit_softcapping" in fields else {}
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norms, biases and sinks: away from ones and zeros
            torch.nn.init.normal_(parameter, float(parameter.detach().mean()), 0.2)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # grouped products know no float64
    return model.eval()


def adapt(model: PreTrainedModel, **options: Any) -> nn.Module:
    """The model with a LoRA adapter, moved off its start, where it would do nothing."""
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=4, **options))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return adapted
