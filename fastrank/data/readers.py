"""Readers: how a row of each format gives a prompt and responses with scores.

A format is a few field names and one of the shapes below: a prompt beside lists (`lists`), beside a
list of objects (`nested`), beside two responses with a verdict (`pair`), with one response per row
(`flat`), or messages that name their parents (`gather_trees`, `gather_messages`). The table of
formats is `fastrank.data.formats`.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from functools import lru_cache
from typing import Any, NamedTuple

from fastrank.data import fields
from fastrank.data.fields import (
    Ends,
    Message,
    Prompt,
    Said,
    field_of,
    listed,
    number,
    numbers,
    response,
)
from fastrank.data.files import Place, Row, one_line
from fastrank.errors import InputError


class ParsedRow(NamedTuple):
    """One row: a prompt and its responses with their scores (higher is better).

    Attributes:
        taught: position of the response that the supervised term is to take.
        counts: what is to be counted of the row.
        refused: why the row is of no use, if it is of none.
        names: the field of each response, of a pair.
    """

    prompt: Prompt | None
    responses: list[Said | None]
    scores: list[float | None]
    id: str | None = None
    tools: list[Any] | None = None
    ended: Ends | None = None
    taught: int | None = None
    counts: tuple[str, ...] = ()
    refused: str | None = None
    names: tuple[str, ...] = ()


Reader = Callable[[Row, Place, str | None], ParsedRow]
#: The name of a prompt's field, or a function of the row.
Asked = str | Callable[[Row, Place], Prompt | None]
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


def from_ranks(ranks: Sequence[float | None]) -> list[float | None]:
    """Ranks (lower is better) as scores: the largest rank of the group minus the rank, or minus the
    rank alone where that difference would round two ranks to one score."""
    largest = max((rank for rank in ranks if rank is not None), default=0.0)
    scores = [None if rank is None else largest - rank for rank in ranks]
    if len(set(scores)) == len(set(ranks)):
        return scores
    return [None if rank is None else -rank for rank in ranks]


def identity(row: Row) -> str | None:
    """The record's own name."""
    value = row.get("id")
    return None if value is None else one_line(value)


def _prompt(row: Row, asked: Asked, place: Place) -> Prompt | None:
    if callable(asked):
        return asked(row, place)
    return fields.prompt(field_of(row, asked, place), place, asked)


def _responses(row: Row, key: str, place: Place) -> list[Said | None]:
    items = listed(field_of(row, key, place), place, key)
    return [response(item, place, f"{key}[{i}]") for i, item in enumerate(items)]


@lru_cache(maxsize=64)
def weights(score_key: str) -> tuple[tuple[str, float], ...]:
    """Fields and weights of a score: a field's name, or a JSON object of several.

    >>> weights('{"helpfulness": 0.7, "safety": 0.3}')
    (('helpfulness', 0.7), ('safety', 0.3))

    Raises:
        InputError: it begins like an object but is none of names and finite numbers.
    """
    if not score_key.lstrip().startswith("{"):
        return ((score_key, 1.0),)
    try:
        given = json.loads(score_key)
    except ValueError:
        given = {}
    if not given or any(
        isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value)
        for value in given.values()
    ):
        expected = "a field or a JSON object of fields and their weights"
        raise InputError(f"score_key must be {expected}, got '{one_line(score_key, 80)}'")
    return tuple((name, float(value)) for name, value in given.items())


def _weighted(values: Mapping[str, float | None], key: str, place: Place) -> float | None:
    """The sum of weighted fields; None if one of them is null."""
    total = 0.0
    for name, weight in weights(key):
        value = values[name]
        if value is None:
            return None
        total += weight * value
    return number(total, place, key)


# ---- a prompt with all of its responses --------------------------------------------------------


def lists(asked: str, responses: str, scores: str) -> Reader:
    """Reader of rows with a prompt, a list of responses and a list of scores under these names."""

    def read(row: Row, place: Place, score_key: str | None) -> ParsedRow:
        said = _responses(row, responses, place)
        values = _listed_scores(row, score_key or scores, len(said), place, responses)
        return ParsedRow(_prompt(row, asked, place), said, values, identity(row))

    return read


def _listed_scores(
    row: Row, key: str, length: int, place: Place, beside: str
) -> list[float | None]:
    names = [name for name, _ in weights(key)]
    found = {name: numbers(row.get(name), length, place, name, beside) for name in names}
    if len(names) == 1 and names[0] == key:
        return found[key]
    return [_weighted({name: found[name][i] for name in names}, key, place) for i in range(length)]


def canonical(row: Row, place: Place, score_key: str | None) -> ParsedRow:
    """A prompt with ``responses``, and ``scores`` or ``ranks``."""
    key = score_key or ("ranks" if row.get("scores") is None and "ranks" in row else "scores")
    found = lists("prompt", "responses", key)(row, place, None)
    return found._replace(scores=from_ranks(found.scores)) if key == "ranks" else found


def best_first(row: Row, place: Place, score_key: str | None) -> ParsedRow:
    """A prompt with ``responses`` in falling order."""
    responses = _responses(row, "responses", place)
    scores: list[float | None] = [float(len(responses) - 1 - i) for i in range(len(responses))]
    return ParsedRow(_prompt(row, "prompt", place), responses, scores, identity(row))


def unscored(row: Row, place: Place, score_key: str | None) -> ParsedRow:
    """A prompt with ``responses`` of no order."""
    found = best_first(row, place, None)
    return found._replace(scores=[0.0] * len(found.responses))


def nested(asked: Asked, outer: str, inner: str, score: str, *, ranks: bool = False) -> Reader:
    """Reader of rows with a prompt and a list of objects ``outer``, which hold a response and a
    score; ``ranks``: the field ``score`` is a rank."""

    def read(row: Row, place: Place, score_key: str | None) -> ParsedRow:
        responses, scores = [], []
        key = score_key or score
        for i, item in enumerate(listed(field_of(row, outer, place), place, outer)):
            if not isinstance(item, dict):
                got = fields.shown(item)
                raise InputError(f"{place}: {outer}[{i}] is {got}, expected an object")
            responses.append(response(item.get(inner), place, f"{outer}[{i}].{inner}"))
            values = {
                name: number(item.get(name), place, f"{outer}[{i}].{name}")
                for name, _ in weights(key)
            }
            scores.append(_weighted(values, key, place))
        if ranks and not score_key:
            scores = from_ranks(scores)
        return ParsedRow(_prompt(row, asked, place), responses, scores, identity(row))

    return read


# ---- PRO ---------------------------------------------------------------------------------------


def pro(row: Row, place: Place, score_key: str | None) -> ParsedRow:
    """PRO's ``prefix``, ``suffix`` and ``reward``."""
    responses = _responses(row, "suffix", place)
    scores = _listed_scores(row, score_key or "reward", len(responses), place, "suffix")
    asked = _pro_prompt(field_of(row, "prefix", place), len(responses), place)
    taught = row.get("sft_index")
    if taught is not None and taught not in range(len(responses)):
        got = fields.shown(taught)
        raise InputError(f"{place}: sft_index is {got}, expected a position in suffix")
    return ParsedRow(asked, responses, scores, identity(row), taught=taught)


_PRO_ROLES = (("<|prompter|>", "user"), ("<|assistant|>", "assistant"))


def _pro_prompt(value: Any, num_responses: int, place: Place) -> Prompt | None:
    """PRO repeats the prompt beside every candidate, as text or as a list of marked turns."""
    if isinstance(value, str) or value is None:
        return fields.prompt(value, place, "prefix")
    items = listed(value, place, "prefix")
    if items and all(isinstance(item, str) for item in items) and _is_turns(items):
        return _pro_turns(items, place)
    if len(items) != num_responses:
        raise InputError(f"{place}: prefix has {len(items)} entries, suffix has {num_responses}")
    if any(item != items[0] for item in items):
        raise InputError(f"{place}: prefix has different prompts, expected one for all candidates")
    if not items:
        return None
    if isinstance(items[0], list):
        return _pro_turns(items[0], place)
    return fields.text(items[0], place, "prefix[0]")


def _is_turns(items: Sequence[str]) -> bool:
    return all(item.startswith(tuple(marker for marker, _ in _PRO_ROLES)) for item in items)


def _pro_turns(items: Sequence[Any], place: Place) -> Prompt:
    turns = [fields.text(item, place, f"prefix[0][{i}]") for i, item in enumerate(items)]
    if not turns or not _is_turns(turns):
        return "".join(turns)
    out = []
    for i, turn in enumerate(turns):
        marker, role = next(pair for pair in _PRO_ROLES if turn.startswith(pair[0]))
        said = turn.removeprefix(marker).strip()
        if said or i < len(turns) - 1:  # the last marker alone only opens the response
            out.append({"role": role, "content": said})
    return out


# ---- two responses with a verdict --------------------------------------------------------------


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
            prompt = _prompt(row, asked, place)
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


# ---- one response per row ----------------------------------------------------------------------


def flat(said: str, scores: Sequence[str]) -> Reader:
    """Reader of rows with a ``prompt``, one response and its score, in one of the fields
    ``scores``; a score may be true or false."""

    def read(row: Row, place: Place, score_key: str | None) -> ParsedRow:
        key = score_key or next((name for name in scores if name in row), None)
        if key is None:
            expected = ", ".join(scores)
            raise InputError(f"{place}: no score field; expected one of {expected}, or score_key")
        values = {name: _flag(row.get(name), place, name) for name, _ in weights(key)}
        return ParsedRow(
            _prompt(row, "prompt", place),
            [response(field_of(row, said, place), place, said)],
            [_weighted(values, key, place)],
            identity(row),
        )

    return read


def _flag(value: Any, place: Place, what: str) -> float | None:
    return float(value) if isinstance(value, bool) else number(value, place, what)


def gather_flat(rows: Iterable[tuple[Place, ParsedRow]]) -> Iterator[tuple[Place, ParsedRow]]:
    """Flat rows gathered by prompt, wherever they stand in the file, at the first row's place."""
    groups: dict[str, tuple[Place, ParsedRow]] = {}
    for place, row in rows:
        key = json.dumps([row.prompt, row.tools], default=str)  # text, null and messages differ
        if key in groups:
            first = groups[key][1]
            if row.ended is not None or first.ended is not None:
                ended = _known(first) + _known(row)
                groups[key] = (groups[key][0], first._replace(ended=ended))
            first.responses.extend(row.responses)
            first.scores.extend(row.scores)
        else:
            groups[key] = (place, row)
    yield from groups.values()


def _known(row: ParsedRow) -> fields.Ends:
    return [None] * len(row.responses) if row.ended is None else row.ended


# ---- trees of messages -------------------------------------------------------------------------

_TREE_ROLES = {"prompter": "user", "assistant": "assistant"}


def gather_trees(rows: Iterable[tuple[Place, Row]]) -> Iterator[tuple[Place, ParsedRow]]:
    """OpenAssistant's trees: every message of a prompter is a prompt, with its replies' ranks."""
    for place, row in rows:
        for found in _branches(field_of(row, "prompt", place), [], place):
            yield place, found


def gather_messages(rows: Iterable[tuple[Place, Row]]) -> Iterator[tuple[Place, ParsedRow]]:
    """The same trees with one message per row, which names its parent."""
    nodes: dict[str, tuple[Place, Row]] = {}
    for place, row in rows:
        nodes[str(field_of(row, "message_id", place))] = place, {**row, "replies": []}
    for _, node in nodes.values():
        parent = nodes.get(str(node.get("parent_id")))
        if parent is not None:
            parent[1]["replies"].append(node)
    for place, node in nodes.values():
        if node.get("parent_id") is None:
            for found in _branches(node, [], place):
                yield place, found
        elif str(node["parent_id"]) not in nodes:
            yield place, ParsedRow(None, [str(node.get("text"))], [None])


def _branches(node: Any, before: list[Message], place: Place) -> Iterator[ParsedRow]:
    if not isinstance(node, dict):
        raise InputError(f"{place}: a message is {fields.shown(node)}, expected an object")
    role = str(field_of(node, "role", place))
    said = fields.text(field_of(node, "text", place), place, "text")
    turns = [*before, {"role": _TREE_ROLES.get(role, role), "content": said}]
    replies = listed(node.get("replies"), place, "replies")
    if role == "prompter" and replies:
        answers: list[Said | None] = []
        ranks = []
        for reply in replies:
            held = reply if isinstance(reply, dict) else {}
            answers.append(response(held.get("text"), place, "text"))
            ranks.append(number(held.get("rank"), place, "rank"))
        yield ParsedRow(turns, answers, from_ranks(ranks), one_line(node.get("message_id", "")))
    for reply in replies:
        yield from _branches(reply, turns, place)
