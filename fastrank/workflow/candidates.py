"""The candidates of one prompt: from several sources as one list, and as a group of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from transformers import PreTrainedTokenizerBase

from fastrank.data.fields import Ends, Said, is_blank
from fastrank.data.manifest import value_checksum
from fastrank.data.packing import Group
from fastrank.data.report import Report
from fastrank.data.tokenize import TokenizeOptions, as_group, encode_record, truncate
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
    drawn: Sequence[tuple[str, Sequence[tuple[str, bool]]]],
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
        drawn: (source, responses) of each policy; of a response its text and whether it came to its
            end.
        counts: updated in place.
        as_chat: the prompt was given to the policies as a message.
    """
    is_chat = as_chat or not isinstance(item.prompt, str)
    said: list[Said] = []
    scores: list[float | None] = []
    sources: list[str] = []
    ended: Ends = []
    seen: set[str] = set()
    counts.empty += item.num_blank

    def add(response: Said, score: float | None, source: str, whole: bool | None) -> bool:
        bare = response.strip() if isinstance(response, str) else value_checksum(response)
        if is_blank(response):
            counts.empty += 1
        elif bare in seen:
            counts.duplicates += 1
        else:
            seen.add(bare)
            said.append(response)
            scores.append(score)
            sources.append(source)
            ended.append(whole)
            counts.kept += 1
            return True
        return False

    for own in zip(item.responses, item.scores, item.sources, item.ended, strict=True):
        add(*own)
    for source, responses in drawn:
        for text, whole in responses:
            counts.new += add(text.strip() if is_chat else text, None, source, whole)
    counts.sizes[len(said)] = counts.sizes.get(len(said), 0) + 1
    return replace(item, responses=said, scores=scores, sources=sources, ended=ended, num_blank=0)


def group_of_item(
    item: PromptItem, tokenizer: PreTrainedTokenizerBase, limit: TokenizeOptions
) -> Group | None:
    """Tokenise an item's responses as training on a file would.

    Args:
        item: a prompt, its responses, and their scores (None counts as 0). Responses that are
            blank and were cut have no token and are left out.
        tokenizer: of the model that is to read them.
        limit: in tokens.

    Returns:
        None if there is no response, no prompt token, or the chat template refuses.
    """
    pairs = enumerate(zip(item.responses, item.ended, strict=True))
    item = item.take([i for i, (said, whole) in pairs if whole is not False or not is_blank(said)])
    if not item.responses:
        return None
    record = item.as_record()
    encoded = encode_record(record, tokenizer, Report(), as_chat=limit.as_chat)
    if encoded is None:
        return None
    return as_group(
        record, truncate(encoded, tokenizer, limit, Report(), record.line), item.place.name
    )
