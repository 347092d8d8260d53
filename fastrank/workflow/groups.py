"""Generated responses as groups: texts that were cut off get no end of turn."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from fastrank.data.packing import Group
from fastrank.data.records import Record
from fastrank.data.report import Report
from fastrank.data.tokenize import TokenizeOptions, encode_record, truncate
from fastrank.workflow.items import Item


def group_of_item(
    item: Item,
    ended: Sequence[bool],
    tokenizer: PreTrainedTokenizerBase,
    limit: TokenizeOptions,
) -> Group | None:
    """The item's responses as tokens, as training on a file would see them, but for their end.

    Args:
        item: a prompt, its responses, and their scores (None counts as 0).
        ended: whether each response came to its end; the others lose the end of turn that
            tokenisation adds, so that no model is taught (or blamed for) an end that was a limit.
        tokenizer: of the model that is to read them.
        limit: in tokens.

    Returns:
        None if there is no response, no prompt token, or the chat template refuses.
    """
    if not item.responses:
        return None
    scores = [0.0 if score is None else score for score in item.scores]
    record = Record(item.prompt, list(item.responses), scores, item.place.line)
    encoded = encode_record(record, tokenizer, Report(), as_chat=limit.as_chat)
    if encoded is None:
        return None
    prompt, responses = encoded
    eos = tokenizer.eos_token_id
    texts = [
        ids if whole or ids[-1:] != [eos] else ids[:-1]
        for ids, whole in zip(responses, ended, strict=True)
    ]
    kept = [i for i, ids in enumerate(texts) if ids]
    if not kept:
        return None
    prompt, texts = truncate(
        (prompt, [texts[i] for i in kept]), tokenizer, limit, Report(), item.place.line
    )
    return Group(
        torch.tensor(prompt),
        tuple(torch.tensor(ids) for ids in texts),
        torch.tensor([scores[i] for i in kept], dtype=torch.float32),
        name=f"{item.place.name}:{item.place.line}",
    )
