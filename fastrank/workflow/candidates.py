"""The candidates of one prompt: from several sources as one list, and as a group of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from transformers import PreTrainedTokenizerBase

from fastrank.data.packing import Group
from fastrank.data.records import Record
from fastrank.data.report import Report
from fastrank.data.tokenize import TokenizeOptions, encode_record, truncate
from fastrank.workflow.items import PromptItem


@dataclass
class MixtureCounts:
    """Counts of responses by their fate; ``kept + duplicates + empty`` is all that came in."""

    kept: int = 0
    new: int = 0
    duplicates: int = 0
    empty: int = 0
    sizes: dict[int, int] = field(default_factory=dict)


def add_responses(
    item: PromptItem,
    drawn: Sequence[tuple[str, Sequence[str]]],
    counts: MixtureCounts,
    *,
    as_chat: bool = False,
) -> PromptItem:
    """Append new responses to an item's own, each source's in order.

    A response is a duplicate of an earlier one if the two differ at most in surrounding white
    space; the first is kept. A message's surrounding white space is dropped, as chat templates and
    training do; in plain text a response may well begin with a space.

    Args:
        item: a prompt and its responses.
        drawn: (source, responses) of each policy.
        counts: updated in place.
        as_chat: the prompt was given to the policies as a message.
    """
    is_chat = as_chat or not isinstance(item.prompt, str)
    texts: list[str] = []
    scores: list[float | None] = []
    sources: list[str] = []
    seen: set[str] = set()
    counts.empty += item.num_blank

    def add(text: str, score: float | None, source: str) -> bool:
        bare = text.strip()
        if not bare:
            counts.empty += 1
        elif bare in seen:
            counts.duplicates += 1
        else:
            seen.add(bare)
            texts.append(text)
            scores.append(score)
            sources.append(source)
            counts.kept += 1
            return True
        return False

    for text, score, source in zip(item.responses, item.scores, item.sources, strict=True):
        add(text, score, source)
    for source, responses in drawn:
        for text in responses:
            counts.new += add(text.strip() if is_chat else text, None, source)
    counts.sizes[len(texts)] = counts.sizes.get(len(texts), 0) + 1
    return replace(item, responses=texts, scores=scores, sources=sources, num_blank=0)


def group_of_item(
    item: PromptItem,
    ended: Sequence[bool],
    tokenizer: PreTrainedTokenizerBase,
    limit: TokenizeOptions,
) -> Group | None:
    """Tokenise an item's responses as training on a file would, except for their end.

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
    record = Record(item.prompt, list(item.responses), scores, item.place.line, tools=item.tools)
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
