"""A tokenizer of single characters, with a few special tokens of chat templates."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

SPECIAL = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>"]


def make_tokenizer(
    merges: list[tuple[str, str]] = (),  # type: ignore[assignment]
    *,
    adds_bos: bool = True,
    bos: str | None = "<s>",
    eos: str | None = "</s>",
    chat_template: str | None = None,
) -> PreTrainedTokenizerBase:
    """Characters as tokens, plus the given merges; a leading BOS as Llama's tokenizer adds it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    for left, right in merges:
        vocabulary.setdefault(left + right, len(vocabulary))
    tokenizer = Tokenizer(BPE(vocabulary, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if adds_bos:
        tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        additional_special_tokens=SPECIAL[2:],
        chat_template=chat_template,
    )
