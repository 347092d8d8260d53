"""Readers of rows with two responses and a verdict about them: preference pairs of every kind."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any

from fastrank.data import fields
from fastrank.data.fields import Message, Prompt, Said, field_of, listed, number, response
from fastrank.data.readers import Asked, ParsedRow, Reader, identity, prompt_of
from fastrank.data.rows import Place, Row
from fastrank.errors import InputError

#: Scores of a row's two responses; None where it does not say.
Verdict = Callable[[Row, Place], tuple[float | None, float | None]]

#: Fields that may hold the prompt of a preference pair that has no ``prompt``, in the order tried.
ASKED = ("question", "instruction", "query", "input")

#: Fields that may hold the scores of ``chosen`` and ``rejected``.
PAIR_SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen_reward", "rejected_reward"),
)

#: What is counted of a row, and reasons to leave one out.
INVERTED = "pairs whose chosen response has the lower score: trained as scored"
PARTED_EARLY = "conversations that part before their last turn"


def pair(first: str, second: str, verdict: Verdict, asked: Asked | None = None) -> Reader:
    """Reader of rows with two responses and a verdict about them.

    Args:
        first, second: fields of the responses.
        verdict: gives their scores.
        asked: the prompt; None for sets in which it may also stand in both responses.
    """

    def read(row: Row, place: Place, score_key: str | None) -> ParsedRow:
        said = field_of(row, first, place), field_of(row, second, place)
        if asked is None:
            prompt = _any_prompt(row, place)
        else:
            prompt = prompt_of(row, asked, place)
            if prompt is None:
                return ParsedRow(None, [None, None], [None, None], identity(row))
        if _are_texts(said[0]) or _are_texts(said[1]):
            return _several(row, prompt, place, first, second)
        found = _split_pair(prompt, *said, place, first, second)
        scores = [*verdict(row, place)]
        return found._replace(scores=scores, id=identity(row), names=(first, second))

    return read


def _any_prompt(row: Row, place: Place) -> Prompt | None:
    if "prompt" in row:
        return fields.prompt(row["prompt"], place, "prompt")
    key = next((name for name in ASKED if is_said(row.get(name))), None)
    if key is None and fields.is_messages(row.get("conversations")):
        key = "conversations"
    return None if key is None else fields.prompt(row[key], place, key)


def preference(row: Row, place: Place, score_key: str | None) -> ParsedRow:
    """``chosen`` and ``rejected``: one text each, several, or conversations."""
    found = _preference(row, place, score_key)
    first, second = found.scores if len(found.scores) == 2 else (None, None)
    if first is not None and second is not None and first < second:
        return found._replace(counts=(INVERTED,))
    return found


def pair_scores(row: Row, place: Place) -> tuple[float, float]:
    """The two scores of a pair, if the row has both as numbers; otherwise 1 and 0."""
    for names in PAIR_SCORES:
        if all(isinstance(row.get(name), (int, float, Decimal)) for name in names):
            first, second = (number(row[name], place, name) for name in names)
            if first is not None and second is not None:
                return first, second
    return 1.0, 0.0


_preference = pair("chosen", "rejected", pair_scores)


def is_said(value: Any) -> bool:
    """Whether a value is a text that says something."""
    return isinstance(value, str) and bool(value.strip())


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(x, str) for x in value)


def _several(row: Row, asked: Prompt | None, place: Place, first: str, second: str) -> ParsedRow:
    """Several chosen or several rejected texts beside one prompt."""
    responses: list[Said | None] = []
    scores: list[float | None] = []
    names: list[str] = []
    for key, score in ((first, 1.0), (second, 0.0)):
        items = row[key] if isinstance(row[key], list) else [row[key]]
        responses += [response(item, place, f"{key}[{i}]") for i, item in enumerate(items)]
        scores += [score] * len(items)
        names += [key] * len(items)
    if asked is None:
        raise InputError(f"{place}: lists of {first} or {second} texts need a field 'prompt'")
    texts = [text for text in responses if isinstance(text, str)]
    if isinstance(asked, str) and texts and all(text.startswith(asked) for text in texts):
        responses = [r.removeprefix(asked) if isinstance(r, str) else r for r in responses]
    return ParsedRow(asked, responses, scores, identity(row), names=tuple(names))


# Verdicts. Ties are two equal scores: the row is kept and counted as one without an order.

_TIES = {"tie", "both", "tie (bothbad)", "bothbad", "both_bad", "neither", "equal", "same"}


def fixed(row: Row, place: Place) -> tuple[float, float]:
    """The first response is the better one."""
    return 1.0, 0.0


def winner(key: str, first: Sequence[Any], second: Sequence[Any]) -> Verdict:
    """A field that names the better response, by one of these values, or a tie; case is ignored."""

    def verdict(row: Row, place: Place) -> tuple[float | None, float | None]:
        value = field_of(row, key, place)
        said = value.strip().lower() if isinstance(value, str) else value
        if said is None:
            return None, None
        for values, scores in ((first, (1.0, 0.0)), (second, (0.0, 1.0)), (_TIES, (0.0, 0.0))):
            if isinstance(said, (str, int)) and said in values:
                return scores
        expected = ", ".join(map(str, (*first, *second, "tie")))
        raise InputError(f"{place}: {key} is {fields.shown(value)}, expected one of {expected}")

    return verdict


def margin(key: str, sign: float = 1.0) -> Verdict:
    """A number that says by how much the first response (``sign`` −1: the second) is better."""

    def verdict(row: Row, place: Place) -> tuple[float | None, float | None]:
        value = number(field_of(row, key, place), place, key)
        if value is None:
            return None, None
        value *= sign
        return max(value, 0.0), max(-value, 0.0)

    return verdict


def two_scores(first: str, second: str) -> Verdict:
    """A score, or a flag, of each response in a field of its own."""

    def verdict(row: Row, place: Place) -> tuple[float | None, float | None]:
        one, two = (number(field_of(row, key, place), place, key) for key in (first, second))
        return one, two

    return verdict


def either(verdicts: Mapping[str, Verdict]) -> Verdict:
    """The verdict of the first of these fields that the row has."""

    def verdict(row: Row, place: Place) -> tuple[float | None, float | None]:
        for key, found in verdicts.items():
            if row.get(key) is not None:
                return found(row, place)
        if any(key in row for key in verdicts):
            return None, None
        raise InputError(f"{place}: no verdict; expected one of {', '.join(verdicts)}")

    return verdict


def summary_prompt(row: Row, place: Place) -> Prompt | None:
    """The prompt of OpenAI's TL;DR comparisons: a post and its title, or an article."""
    about = field_of(row, "info", place)
    about = about if isinstance(about, dict) else {}
    if is_said(about.get("article")):
        return f"{fields.text(about['article'], place, 'info.article')}\n\nTL;DR:"
    named = (("SUBREDDIT: r/", "subreddit"), ("TITLE: ", "title"), ("POST: ", "post"))
    lines = [
        start + fields.text(about[key], place, f"info.{key}")
        for start, key in named
        if is_said(about.get(key))
    ]
    return "\n".join([*lines, "TL;DR:"]) if lines else None


def field_within(key: str, inner: str) -> Asked:
    """The prompt of rows whose field ``key`` is an object with a text ``inner``."""

    def asked(row: Row, place: Place) -> Prompt | None:
        value = field_of(row, key, place)
        held = value.get(inner) if isinstance(value, dict) else value
        return fields.prompt(held, place, f"{key}.{inner}")

    return asked


def chosen_item(row: Row, place: Place, score_key: str | None) -> ParsedRow:
    """OpenAI's TL;DR comparisons: two ``summaries``, and the position of the better: ``choice``."""
    items = listed(field_of(row, "summaries", place), place, "summaries")
    texts = [item.get("text") if isinstance(item, dict) else item for item in items]
    said = [response(text, place, f"summaries[{i}].text") for i, text in enumerate(texts)]
    choice = field_of(row, "choice", place)
    if choice is not None and choice not in range(len(said)):
        got = fields.shown(choice)
        raise InputError(f"{place}: choice is {got}, expected a position in summaries")
    scores = [None if choice is None else float(i == choice) for i in range(len(said))]
    return ParsedRow(summary_prompt(row, place), said, scores, identity(row))


# Where the prompt ends and two responses begin. Published sets disagree: the prompt stands apart,
# or is repeated inside ``chosen`` and ``rejected``, or is only there (implicit). Conversations are
# cut at their common leading messages. Texts with an implicit prompt are cut after the first
# ``Assistant:`` that follows the last ``Human:`` of their common beginning, as Anthropic's HH data
# needs; without such a marker at the last white space, so that no word is split.

_HUMAN = re.compile(r"(?:^|\n)[ \t]*(?:Human|User):")
_ASSISTANT = re.compile(r"(?:^|\n)[ \t]*Assistant:")


def _split_pair(
    prompt: Prompt | None, chosen: Any, rejected: Any, place: Place, *names: str
) -> ParsedRow:
    """The prompt and the two responses of one pair; null responses stay None.

    Raises:
        InputError: the two are not of one kind.
    """
    chosen, rejected = (fields.structs(x) for x in (chosen, rejected))
    chosen, rejected = ([x] if isinstance(x, dict) else x for x in (chosen, rejected))
    if fields.is_messages(chosen) and fields.is_messages(rejected):
        both = [
            fields.messages(x, place, n) for x, n in zip((chosen, rejected), names, strict=True)
        ]
        return _split_messages(prompt, *both)
    first, second = (
        None if x is None else fields.text(x, place, n)
        for x, n in zip((chosen, rejected), names, strict=True)
    )
    if first is None or second is None:
        return ParsedRow(prompt, [first, second], [])
    if (
        isinstance(prompt, str)
        and prompt
        and first.startswith(prompt)
        and second.startswith(prompt)
    ):
        return ParsedRow(prompt, [first.removeprefix(prompt), second.removeprefix(prompt)], [])
    if prompt is not None:
        return ParsedRow(prompt, [first, second], [])
    start, is_dialogue = _common_text(first, second)
    responses: list[Said | None] = [first[start:], second[start:]]
    parted = is_dialogue and any("\n\nHuman:" in text[start:] for text in (first, second))
    return ParsedRow(first[:start] or None, responses, [], refused=PARTED_EARLY if parted else None)


def _split_messages(
    prompt: Prompt | None, chosen: list[Message], rejected: list[Message]
) -> ParsedRow:
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    found = ParsedRow(prompt, [fields.said(turns[shared:]) for turns in (chosen, rejected)], [])
    lead = chosen[:shared]
    if not lead:
        return found
    asked = [] if prompt is None else fields.as_messages(prompt)
    if isinstance(prompt, str):
        repeated = any(prompt.strip() in turn["content"] for turn in lead)
    else:
        repeated = lead[: len(asked)] == asked
    return found._replace(prompt=lead if repeated else [*asked, *lead])


def _common_text(first: str, second: str) -> tuple[int, bool]:
    """Where the implicit prompt of two texts ends, and whether they are a dialogue."""
    common = os.path.commonprefix([first, second])
    asked = [found.end() for found in _HUMAN.finditer(common)]
    marker = next(
        (m for start in (*reversed(asked), 0) if (m := _ASSISTANT.search(common, start))), None
    )
    if marker is not None:
        return marker.end(), bool(asked)
    end = len(common)
    while end and not common[end - 1].isspace():
        end -= 1
    return end, False
