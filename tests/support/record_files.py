"""Record files and a tokenizer for tests of reading and caching."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

WORDS = "the cat sat on a red mat and saw té big dog run to home 🟦 now".split()


def byte_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """Bytes as tokens, with a leading BOS, as Llama's tokenizer adds it."""
    alphabet = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(BPE({token: i for i, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=chat_template
    )


def some_rows(number: int, seed: int = 0) -> list[dict[str, Any]]:
    """Canonical rows of 1 to 5 candidates; some of no use, some with ties, some prompts twice."""
    chance = random.Random(seed)

    def text(longest: int) -> str:
        return " ".join(chance.choice(WORDS) for _ in range(chance.randint(1, longest)))

    rows = []
    for _ in range(number):
        n = chance.randint(1, 5)
        responses: list[str | None] = [" " + text(20) for _ in range(n)]
        if chance.random() < 0.1:
            responses[-1] = chance.choice(["", "  ", None])
        scores: list[float | None] = [chance.choice([0.5, 1.0, chance.random()]) for _ in range(n)]
        if chance.random() < 0.05:
            scores[0] = None
        rows.append({"prompt": text(8), "responses": responses, "scores": scores})
    return rows


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path
