"""Readers: how a row of each format gives a prompt and responses with scores.

A format is a few field names and a shape: a prompt beside lists (`lists`) or beside a list of
objects (`nested`), which are here; beside two responses with a verdict (`fastrank.data.pairs`); or
rows that have to be gathered (`flat`, `gather_trees`, `gather_messages`). The table of formats is
`fastrank.data.formats`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from fastrank.data.rows import Place, Row
from fastrank.errors import InputError, one_line


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


def prompt_of(row: Row, asked: Asked, place: Place) -> Prompt | None:
    if callable(asked):
        return asked(row, place)
    return fields.prompt(field_of(row, asked, place), place, asked)


def responses_of(row: Row, key: str, place: Place) -> list[Said | None]:
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


def weighted(values: Mapping[str, float | None], key: str, place: Place) -> float | None:
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
        said = responses_of(row, responses, place)
        values = _listed_scores(row, score_key or scores, len(said), place, responses)
        return ParsedRow(prompt_of(row, asked, place), said, values, identity(row))

    return read


def _listed_scores(
    row: Row, key: str, length: int, place: Place, beside: str
) -> list[float | None]:
    names = [name for name, _ in weights(key)]
    found = {name: numbers(row.get(name), length, place, name, beside) for name in names}
    if len(names) == 1 and names[0] == key:
        return found[key]
    return [weighted({name: found[name][i] for name in names}, key, place) for i in range(length)]


def canonical(row: Row, place: Place, score_key: str | None) -> ParsedRow:
    """A prompt with ``responses``, and ``scores`` or ``ranks``."""
    key = score_key or ("ranks" if row.get("scores") is None and "ranks" in row else "scores")
    found = lists("prompt", "responses", key)(row, place, None)
    return found._replace(scores=from_ranks(found.scores)) if key == "ranks" else found


def best_first(row: Row, place: Place, score_key: str | None) -> ParsedRow:
    """A prompt with ``responses`` in falling order."""
    responses = responses_of(row, "responses", place)
    scores: list[float | None] = [float(len(responses) - 1 - i) for i in range(len(responses))]
    return ParsedRow(prompt_of(row, "prompt", place), responses, scores, identity(row))


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
            scores.append(weighted(values, key, place))
        if ranks and not score_key:
            scores = from_ranks(scores)
        return ParsedRow(prompt_of(row, asked, place), responses, scores, identity(row))

    return read


# ---- PRO ---------------------------------------------------------------------------------------


def pro(row: Row, place: Place, score_key: str | None) -> ParsedRow:
    """PRO's ``prefix``, ``suffix`` and ``reward``."""
    responses = responses_of(row, "suffix", place)
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


# ---- one response per row, or one tree of messages -------------------------------------------


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
            prompt_of(row, "prompt", place),
            [response(field_of(row, said, place), place, said)],
            [weighted(values, key, place)],
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
