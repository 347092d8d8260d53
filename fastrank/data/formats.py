"""The record formats: how a row of each is recognised and read.

A format is recognised by the fields of the file's first row and then holds for the whole file: a
later row that lacks them is an error with its line rather than a second guess. Each format has one
small function; all of them give a `ParsedRow`, candidates in the file's order, None for null.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
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
    """

    prompt: Prompt | None
    responses: list[Said | None]
    scores: list[float | None]
    id: str | None = None
    tools: list[Any] | None = None
    ended: Ends | None = None
    taught: int | None = None
    counts: tuple[str, ...] = ()


Reader = Callable[[Row, Place, str | None], ParsedRow]

#: Fields that may hold the prompt of a preference pair that has no ``prompt``, in the order tried.
ASKED = ("question", "instruction", "query", "input")

#: Text fields that are a part of the prompt wherever a file has them.
PROMPT_LIKE = (*ASKED, "context", "history", "post", "problem", "system_prompt", "system_message")

#: Fields that may hold the scores of ``chosen`` and ``rejected``.
PAIR_SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen_reward", "rejected_reward"),
)
INVERTED = "pairs whose chosen response has the lower score: trained as scored"

#: Fields that may hold the score of a flat row, in the order tried; the last is HelpSteer's.
FLAT_SCORES = ("score", "reward", "rating", "overall_score", "helpfulness")


def from_ranks(ranks: Sequence[float | None]) -> list[float | None]:
    """Ranks (lower is better) as scores: the largest rank of the group minus the rank, or minus the
    rank alone where that difference would round two ranks to one score."""
    largest = max((rank for rank in ranks if rank is not None), default=0.0)
    scores = [None if rank is None else largest - rank for rank in ranks]
    if len(set(scores)) == len(set(ranks)):
        return scores
    return [None if rank is None else -rank for rank in ranks]


def _identity(row: Row) -> str | None:
    value = row.get("id")
    return None if value is None else one_line(value)


def _prompt(row: Row, key: str, place: Place) -> Prompt | None:
    return fields.prompt(field_of(row, key, place), place, key)


def _responses(row: Row, key: str, place: Place) -> list[Said | None]:
    items = listed(field_of(row, key, place), place, key)
    return [response(item, place, f"{key}[{i}]") for i, item in enumerate(items)]


def _lists(asked: str, responses: str, scores: str) -> Reader:
    """Reader of rows with a prompt, a list of responses and a list of scores under these names."""

    def read(row: Row, place: Place, score_key: str | None) -> ParsedRow:
        said = _responses(row, responses, place)
        key = score_key or scores
        values = numbers(row.get(key), len(said), place, key, responses)
        return ParsedRow(_prompt(row, asked, place), said, values, _identity(row))

    return read


def _canonical(row: Row, place: Place, score_key: str | None) -> ParsedRow:
    key = score_key or ("ranks" if row.get("scores") is None and "ranks" in row else "scores")
    found = _lists("prompt", "responses", key)(row, place, None)
    return found._replace(scores=from_ranks(found.scores)) if key == "ranks" else found


def _pro(row: Row, place: Place, score_key: str | None) -> ParsedRow:
    responses = _responses(row, "suffix", place)
    key = score_key or "reward"
    scores = numbers(row.get(key), len(responses), place, key, "suffix")
    asked = _pro_prompt(field_of(row, "prefix", place), len(responses), place)
    taught = row.get("sft_index")
    if taught is not None and taught not in range(len(responses)):
        got = fields.shown(taught)
        raise InputError(f"{place}: sft_index is {got}, expected a position in suffix")
    return ParsedRow(asked, responses, scores, _identity(row), taught=taught)


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


def _ultrafeedback(row: Row, place: Place, score_key: str | None) -> ParsedRow:
    return _nested(row, place, "instruction", "completions", "response", score_key, "overall_score")


def _nectar(row: Row, place: Place, score_key: str | None) -> ParsedRow:
    found = _nested(row, place, "prompt", "answers", "answer", score_key, "rank")
    return found if score_key else found._replace(scores=from_ranks(found.scores))


def _nested(
    row: Row, place: Place, asked: str, outer: str, inner: str, score_key: str | None, default: str
) -> ParsedRow:
    responses, scores = [], []
    key = score_key or default
    for i, item in enumerate(listed(field_of(row, outer, place), place, outer)):
        if not isinstance(item, dict):
            got = fields.shown(item)
            raise InputError(f"{place}: {outer}[{i}] is {got}, expected an object")
        responses.append(response(item.get(inner), place, f"{outer}[{i}].{inner}"))
        scores.append(number(item.get(key), place, f"{outer}[{i}].{key}"))
    return ParsedRow(_prompt(row, asked, place), responses, scores, _identity(row))


def _best_first(row: Row, place: Place, score_key: str | None) -> ParsedRow:
    responses = _responses(row, "responses", place)
    scores: list[float | None] = [float(len(responses) - 1 - i) for i in range(len(responses))]
    return ParsedRow(_prompt(row, "prompt", place), responses, scores, _identity(row))


def _unscored(row: Row, place: Place, score_key: str | None) -> ParsedRow:
    found = _best_first(row, place, None)
    return found._replace(scores=[0.0] * len(found.responses))


def _preference(row: Row, place: Place, score_key: str | None) -> ParsedRow:
    key = "prompt"
    if key not in row:
        key = next((name for name in ASKED if _is_said(row.get(name))), key)
    asked = fields.prompt(row.get(key), place, key)
    chosen, rejected = field_of(row, "chosen", place), field_of(row, "rejected", place)
    if _are_texts(chosen) or _are_texts(rejected):
        return _several(row, asked, place)
    prompt, responses = _split_pair(asked, chosen, rejected, place)
    scores = _pair_scores(row, place)
    counts = (INVERTED,) if scores[0] < scores[1] else ()
    return ParsedRow(prompt, responses, [*scores], _identity(row), counts=counts)


def _pair_scores(row: Row, place: Place) -> tuple[float, float]:
    """The two scores of a pair, if the row has both as numbers; otherwise 1 and 0."""
    for names in PAIR_SCORES:
        if all(isinstance(row.get(name), (int, float, Decimal)) for name in names):
            first, second = (number(row[name], place, name) for name in names)
            if first is not None and second is not None:
                return first, second
    return 1.0, 0.0


def _is_said(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(x, str) for x in value)


def _several(row: Row, asked: Prompt | None, place: Place) -> ParsedRow:
    """Several chosen or several rejected texts beside one prompt."""
    responses: list[Said | None] = []
    scores: list[float | None] = []
    for key, score in (("chosen", 1.0), ("rejected", 0.0)):
        items = row[key] if isinstance(row[key], list) else [row[key]]
        responses += [response(item, place, f"{key}[{i}]") for i, item in enumerate(items)]
        scores += [score] * len(items)
    if asked is None:
        raise InputError(f"{place}: lists of chosen or rejected texts need a field 'prompt'")
    texts = [text for text in responses if isinstance(text, str)]
    if isinstance(asked, str) and texts and all(text.startswith(asked) for text in texts):
        responses = [r.removeprefix(asked) if isinstance(r, str) else r for r in responses]
    return ParsedRow(asked, responses, scores, _identity(row))


def _flat(row: Row, place: Place, score_key: str | None) -> ParsedRow:
    key = score_key or next((k for k in FLAT_SCORES if k in row), None)
    if key is None:
        expected = ", ".join(FLAT_SCORES)
        raise InputError(f"{place}: no score field; expected one of {expected}, or score_key")
    asked = _prompt(row, "prompt", place)
    said = response(field_of(row, "response", place), place, "response")
    return ParsedRow(asked, [said], [number(row.get(key), place, key)], _identity(row))


class Format(NamedTuple):
    """A record format: the fields that give it away, how its rows are read."""

    fields: tuple[str, ...]
    read: Reader
    has_scores: bool = True


#: In the order in which they are tried on the first row.
FORMATS: dict[str, Format] = {
    "all_rm_scores": Format(
        ("prompt", "all_generated_responses"),
        _lists("prompt", "all_generated_responses", "all_rm_scores"),
    ),
    "ultrafeedback": Format(("instruction", "completions"), _ultrafeedback),
    "nectar": Format(("prompt", "answers"), _nectar),
    "pro": Format(("prefix", "suffix"), _pro),
    "rrhf": Format(("query", "responses"), _lists("query", "responses", "scores")),
    "canonical": Format(("prompt", "responses"), _canonical),
    "best_first": Format(("prompt", "responses"), _best_first, has_scores=False),
    "unscored": Format(("prompt", "responses"), _unscored, has_scores=False),
    "preference": Format(("chosen", "rejected"), _preference, has_scores=False),
    "flat": Format(("prompt", "response"), _flat),
}


def detect(row: Row, place: Place, score_key: str | None = None) -> str:
    """The format of a file by its first row.

    ``prompt`` and ``responses`` alone mean best-first; with ``scores``, ``ranks`` or ``score_key``
    they are canonical. ``unscored`` is never detected: it has to be asked for.
    """
    for name, known in FORMATS.items():
        if all(key in row for key in known.fields):
            if name != "canonical" or _scored(row) or score_key is not None:
                return name
    have = one_line(", ".join(map(str, row)) or "none", 80)
    raise InputError(
        f"{place}: fields of no known format ({have}); known: {', '.join(FORMATS)}; "
        "--columns maps names, e.g. prompt=question"
    )


def _scored(row: Row) -> bool:
    return "scores" in row or "ranks" in row


def reader(name: str, score_key: str | None = None) -> Reader:
    """The function that reads rows of a format asked for by name."""
    if name not in FORMATS:
        near = difflib.get_close_matches(name, FORMATS, 1)
        hint = f", did you mean '{near[0]}'?" if near else f"; known: {', '.join(FORMATS)}"
        raise InputError(f"unknown format '{one_line(name, 40)}'{hint}")
    if score_key is not None and not FORMATS[name].has_scores:
        raise InputError(f"format '{name}' has no scores, so score_key does not apply to it")
    return FORMATS[name].read


def parse(name: str, row: Row, place: Place, score_key: str | None = None) -> ParsedRow:
    """A row of a known format, completed."""
    found = FORMATS[name].read(row, place, score_key)
    return complete(found, row, place, FORMATS[name].fields)


def complete(found: ParsedRow, row: Row, place: Place, used: Sequence[str]) -> ParsedRow:
    """A parsed row with what any format may have beside it: a system message, tools, and how each
    response ended (``ended``).

    With a field ``system``, a text prompt becomes a message of the user.

    Args:
        found: what the format's fields ``used`` gave.

    Raises:
        InputError: a field that is a part of the prompt is not read.
    """
    if row.get("tools") is not None:
        found = found._replace(tools=fields.tools(row["tools"], place))
    if row.get("ended") is not None:
        found = found._replace(ended=fields.ends(row["ended"], len(found.responses), place))
    if row.get("system") is not None and found.prompt is not None:
        system = fields.text(row["system"], place, "system")
        found = found._replace(prompt=_with_system(found.prompt, system, place))
    unread = [name for name in PROMPT_LIKE if name in row and name not in used]
    if unread:
        asked = found.prompt or ""
        said = asked if isinstance(asked, str) else "\n".join(m["content"] for m in asked)
        for name in unread:
            if _is_said(row[name]) and row[name].strip() not in said:
                raise InputError(
                    f"{place}: the field '{name}' looks like a part of the prompt and is not read; "
                    f"map it (--columns prompt={name}) or leave it out (--columns {name}=)"
                )
    return found


def _with_system(prompt: Prompt, system: str, place: Place) -> Prompt:
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not system.strip():
        return turns
    if turns and turns[0]["role"] == "system":
        if turns[0]["content"].strip() != system.strip():
            raise InputError(f"{place}: the field 'system' and the prompt's system message differ")
        return turns
    return [{"role": "system", "content": system}, *turns]


#: The fields of a file by the names that the formats know; an empty name leaves a field out.
Columns = tuple[tuple[str, str], ...]


def column_names() -> list[str]:
    """The names that `columns` maps to fields of a file."""
    names = {"scores", "ranks", "system", "tools", "ended", "id", "sft_index", *FLAT_SCORES}
    names.update(*PAIR_SCORES)
    return sorted(names.union(*(known.fields for known in FORMATS.values())))


def columns(given: str | Mapping[str, str] | Columns | None) -> Columns:
    """A field map, from a text such as ``"prompt=question,system=instructions"`` or a mapping.

    Raises:
        InputError: it cannot be read, or maps a name that no format knows.
    """
    if given is None:
        return ()
    if isinstance(given, str):
        parts = [part.partition("=") for part in given.split(",")]
        if any(not equals or not ours.strip() for ours, equals, _ in parts):
            raise InputError(f"columns must be like prompt=question,system=role, got '{given}'")
        pairs = [(ours.strip(), theirs.strip()) for ours, _, theirs in parts]
    else:
        pairs = [(str(a), str(b)) for a, b in (dict(given).items())]
    known = column_names()
    for ours, theirs in pairs:
        if theirs and ours not in known:
            raise InputError(f"columns: no format has '{ours}'; known: {', '.join(known)}")
    if len({ours for ours, _ in pairs}) < len(pairs):
        raise InputError(f"columns: a name is mapped twice in '{given}'")
    return tuple(pairs)


def check_columns(pairs: Columns, row: Row, place: Place) -> None:
    """Refuse a field map that names what a file's first row does not have."""
    for ours, theirs in pairs:
        if (theirs or ours) not in row:
            have = one_line(", ".join(map(str, row)) or "none", 200)
            raise InputError(f"{place}: columns names the field '{theirs or ours}'; it has: {have}")


def renamed(row: Row, pairs: Columns) -> Row:
    """A row with its fields under the names that the formats know."""
    if not pairs:
        return row
    taken = {theirs or ours for ours, theirs in pairs}
    out = {key: value for key, value in row.items() if key not in taken}
    return out | {ours: row[theirs] for ours, theirs in pairs if theirs and theirs in row}


def check_still(name: str, row: Row, place: Place) -> None:
    """Refuse a row with scores in a file whose first row, without, made it best-first."""
    if name == "best_first" and _scored(row):
        raise InputError(
            f"{place}: has scores or ranks, but the first record had none; give the format by name"
        )


# ---- preference pairs: where the prompt ends and the two responses begin -------------------------
#
# Published sets disagree: the prompt stands apart, or is repeated inside ``chosen`` and
# ``rejected``, or is only there (implicit). Conversations are cut at their common leading messages.
# Texts with an implicit prompt are cut after the last ``Assistant:`` of their common beginning, as
# Anthropic's HH data needs; without that marker at the last white space, so that no word is split.

_MARKER = "Assistant:"


def _split_pair(
    prompt: Prompt | None, chosen: Any, rejected: Any, place: Place
) -> tuple[Prompt | None, list[Said | None]]:
    """(prompt, [chosen, rejected]) of one pair; null responses stay None.

    Raises:
        InputError: the two are not of one kind, or conversations differ in more than their last
            message.
    """
    if isinstance(chosen, dict):
        chosen = [chosen]
    if isinstance(rejected, dict):
        rejected = [rejected]
    if fields.is_messages(chosen) and fields.is_messages(rejected):
        return _split_messages(
            prompt,
            fields.messages(chosen, place, "chosen"),
            fields.messages(rejected, place, "rejected"),
            place,
        )
    first = None if chosen is None else fields.text(chosen, place, "chosen")
    second = None if rejected is None else fields.text(rejected, place, "rejected")
    if first is None or second is None:
        return prompt, [first, second]
    if (
        isinstance(prompt, str)
        and prompt
        and first.startswith(prompt)
        and second.startswith(prompt)
    ):
        return prompt, [first.removeprefix(prompt), second.removeprefix(prompt)]
    if prompt is not None:
        return prompt, [first, second]
    start = _common_text(first, second)
    return first[:start] or None, [first[start:], second[start:]]


def _split_messages(
    prompt: Prompt | None, chosen: list[Message], rejected: list[Message], place: Place
) -> tuple[Prompt | None, list[Said | None]]:
    if not chosen or not rejected:
        return prompt, [fields.said(m[-1]) if m else None for m in (chosen, rejected)]
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    for name, conversation in (("chosen", chosen), ("rejected", rejected)):
        if len(conversation) != shared + 1:
            extra = f"differ from message {shared + 1} on, {name} has {len(conversation)}"
            raise InputError(f"{place}: chosen and rejected {extra}, expected one last message")
    responses: list[Said | None] = [fields.said(chosen[-1]), fields.said(rejected[-1])]
    lead = chosen[:shared]
    if not lead:
        return prompt, responses
    if isinstance(prompt, list) and lead[: len(prompt)] != prompt:
        return [*prompt, *lead], responses
    return lead, responses


def _common_text(first: str, second: str) -> int:
    """Where the implicit prompt of two texts ends."""
    common = os.path.commonprefix([first, second])
    marker = common.rfind(_MARKER)
    if marker >= 0:
        return marker + len(_MARKER)
    end = len(common)
    while end and not common[end - 1].isspace():
        end -= 1
    return end
