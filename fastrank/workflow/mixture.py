"""The candidates of one prompt from several sources as one list: no blanks, nothing twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from fastrank.data.fields import Prompt
from fastrank.workflow.items import Item


@dataclass
class MixtureCounts:
    """What became of the responses; ``kept + duplicates + empty`` is all that came in."""

    kept: int = 0
    new: int = 0
    duplicates: int = 0
    empty: int = 0
    sizes: dict[int, int] = field(default_factory=dict)


def add_responses(
    item: Item,
    drawn: Sequence[tuple[str, Sequence[str]]],
    counts: MixtureCounts,
    *,
    as_chat: bool = False,
) -> Item:
    """The item with new responses behind its own, each source's in order.

    A response is a duplicate of an earlier one if the two differ in surrounding white space at
    most; the first is kept. A message's surrounding white space is dropped, as chat templates and
    training do; in plain text a response may well begin with a space.

    Args:
        item: a prompt and its responses.
        drawn: (source, responses) of each policy.
        counts: is added to.
        as_chat: the prompt was given to the policies as a message.
    """
    is_chat = as_chat or is_messages(item.prompt)
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


def is_messages(prompt: Prompt) -> bool:
    """Whether a prompt is chat messages."""
    return not isinstance(prompt, str)
