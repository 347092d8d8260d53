"""Models and tokenizers of a few thousand weights, made on the spot, to run whole commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

SPECIAL = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>"]
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def ascii_tokenizer(chat_template: str | None = None, **special: Any) -> PreTrainedTokenizerFast:
    """The 96 characters of ASCII text as tokens, behind six special ones."""
    alphabet = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"]  # space and line end
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"} | special
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        additional_special_tokens=SPECIAL[3:],
        chat_template=chat_template,
        **names,
    )


def _sizes(tokenizer: PreTrainedTokenizerFast, **options: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **options,
    }


def save_llama(
    folder: Path, *, seed: int = 0, chat_template: str | None = None, **sizes: int
) -> Path:
    """A random Llama with its tokenizer; ``initializer_range`` makes it prefer some tokens."""
    tokenizer = ascii_tokenizer(chat_template)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**_sizes(tokenizer, initializer_range=0.3, **sizes)))
    return _save(folder, model, tokenizer)


def save_silent_model(folder: Path) -> Path:
    """A model whose first token is always the end of the response."""
    tokenizer = ascii_tokenizer()
    torch.manual_seed(0)
    model = PhiForCausalLM(PhiConfig(**_sizes(tokenizer)))
    assert tokenizer.eos_token_id is not None
    with torch.no_grad():
        model.lm_head.bias.zero_()
        model.lm_head.bias[tokenizer.eos_token_id] = 1e4
    return _save(folder, model, tokenizer)


def save_classifier(folder: Path, *, num_labels: int = 1, seed: int = 0) -> Path:
    """A random Llama reward model."""
    tokenizer = ascii_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(**_sizes(tokenizer, num_labels=num_labels))
    return _save(folder, LlamaForSequenceClassification(config), tokenizer)


def _save(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
