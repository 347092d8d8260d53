"""The table of record formats: the fields that give each away, and how its rows are read.

A format is recognised by the fields of the file's first row and then holds for the whole file: a
later row that lacks them is an error with its line rather than a second guess.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from fastrank.data import fields, pairs, readers
from fastrank.data.fields import Prompt
from fastrank.data.pairs import ASKED, PAIR_SCORES
from fastrank.data.readers import ParsedRow, Reader
from fastrank.data.rows import Place, Row
from fastrank.errors import InputError, one_line

#: Text fields that are a part of the prompt wherever a file has them.
PROMPT_LIKE = (*ASKED, "context", "history", "post", "problem", "system_prompt", "system_message")

#: Fields that may hold the score of a flat row, in the order tried; ``helpfulness`` is HelpSteer's.
FLAT_SCORES = ("score", "reward", "rating", "overall_score", "helpfulness", "label")

Gather = Callable[[Iterable[tuple[Place, Row]], str | None], Iterator[tuple[Place, ParsedRow]]]


class Format(NamedTuple):
    """A record format.

    Attributes:
        fields: the fields that give it away.
        read: reads a row; None if rows say nothing alone.
        has_scores: whether the file has numbers, and not an order alone.
        listed: a field that has to hold a list, where other formats share the names.
        gather: makes rows of the whole file into records, for formats that spread one over several
            rows or hold several in one.
    """

    fields: tuple[str, ...]
    read: Reader | None
    has_scores: bool = True
    gather: Gather | None = None
    listed: str | None = None


def _gathered(said: str, scores: Sequence[str]) -> Format:
    """A format with one response per row."""
    names = ("prompt", said)
    read = readers.flat(said, scores)

    def gather(
        rows: Iterable[tuple[Place, Row]], score_key: str | None
    ) -> Iterator[tuple[Place, ParsedRow]]:
        parsed = (
            (place, complete(read(row, place, score_key), row, place, names)) for place, row in rows
        )
        return ((place, _behind_prompt(found)) for place, found in readers.gather_flat(parsed))

    return Format(names, read, gather=gather)


#: What a pair of ``response_a`` and ``response_b`` may be judged by.
_AB_VERDICTS = {
    "winner": pairs.winner(
        "winner", ("a", "model_a", "response_a"), ("b", "model_b", "response_b")
    ),
    "winner_model_a": pairs.two_scores("winner_model_a", "winner_model_b"),
    "margin": pairs.margin("margin"),
    "score_a": pairs.two_scores("score_a", "score_b"),
}

#: In the order in which they are tried on the first row.
FORMATS: dict[str, Format] = {
    "all_rm_scores": Format(
        ("prompt", "all_generated_responses"),
        readers.lists("prompt", "all_generated_responses", "all_rm_scores"),
    ),
    "ultrafeedback": Format(
        ("instruction", "completions"),
        readers.nested("instruction", "completions", "response", "overall_score"),
    ),
    "nectar": Format(
        ("prompt", "answers"), readers.nested("prompt", "answers", "answer", "rank", ranks=True)
    ),
    "stack_exchange": Format(
        ("question", "answers"), readers.nested("question", "answers", "text", "pm_score")
    ),
    # GPT-4-LLM's comparisons, version 2 and 1; in the latter the first is GPT-4's, the better one.
    "gpt4_llm": Format(
        ("user_input", "responses_and_scores"),
        readers.nested("user_input", "responses_and_scores", "response", "score"),
    ),
    "gpt4_llm_pairs": Format(
        ("user_input", "completion_a", "completion_b"),
        pairs.pair("completion_a", "completion_b", pairs.fixed, "user_input"),
        has_scores=False,
    ),
    "pro": Format(("prefix", "suffix"), readers.pro),
    "rrhf": Format(("query", "responses"), readers.lists("query", "responses", "scores")),
    # What RRHF's scoring script leaves.
    "rrhf_scored": Format(
        ("prompt", "response", "scores"),
        readers.lists("prompt", "response", "scores"),
        listed="response",
    ),
    "canonical": Format(("prompt", "responses"), readers.canonical),
    "best_first": Format(("prompt", "responses"), readers.best_first, has_scores=False),
    "unscored": Format(("prompt", "responses"), readers.unscored, has_scores=False),
    "preference": Format(("chosen", "rejected"), pairs.preference, has_scores=False),
    "stack_pairs": Format(
        ("question", "response_j", "response_k"),
        pairs.pair("response_j", "response_k", pairs.fixed, "question"),
        has_scores=False,
    ),
    "ab": Format(
        ("prompt", "response_a", "response_b"),
        pairs.pair(
            "response_a",
            "response_b",
            pairs.either(_AB_VERDICTS),
            "prompt",
        ),
        has_scores=False,
    ),
    "arena": Format(
        ("conversation_a", "conversation_b", "winner"),
        pairs.pair(
            "conversation_a",
            "conversation_b",
            pairs.winner("winner", ("model_a", "a"), ("model_b", "b")),
        ),
        has_scores=False,
    ),
    "helpsteer2": Format(
        ("prompt", "response_1", "response_2", "preference_strength"),
        pairs.pair("response_1", "response_2", pairs.margin("preference_strength", -1.0), "prompt"),
        has_scores=False,
    ),
    "helpsteer3": Format(
        ("context", "response1", "response2", "overall_preference"),
        pairs.pair("response1", "response2", pairs.margin("overall_preference", -1.0), "context"),
        has_scores=False,
    ),
    "safe_rlhf": Format(
        ("prompt", "response_0", "response_1", "better_response_id"),
        pairs.pair(
            "response_0",
            "response_1",
            pairs.winner("better_response_id", (0,), (1,)),
            "prompt",
        ),
        has_scores=False,
    ),
    "shp": Format(
        ("history", "human_ref_A", "human_ref_B", "labels"),
        pairs.pair("human_ref_A", "human_ref_B", pairs.winner("labels", (1,), (0,)), "history"),
        has_scores=False,
    ),
    "webgpt": Format(
        ("question", "answer_0", "answer_1", "score_0", "score_1"),
        pairs.pair(
            "answer_0",
            "answer_1",
            pairs.two_scores("score_0", "score_1"),
            pairs.field_within("question", "full_text"),
        ),
        has_scores=False,
    ),
    "tldr": Format(("info", "summaries", "choice"), pairs.chosen_item, has_scores=False),
    "oasst_trees": Format(
        ("message_tree_id", "prompt"), None, False, lambda rows, _: readers.gather_trees(rows)
    ),
    "oasst": Format(
        ("message_id", "parent_id", "text", "role"),
        None,
        False,
        lambda rows, _: readers.gather_messages(rows),
    ),
    "completions": _gathered("completion", ("label", *FLAT_SCORES[:-1])),
    "flat": _gathered("response", FLAT_SCORES),
}


def detect(row: Row, place: Place, score_key: str | None = None) -> str:
    """The format of a file by its first row.

    ``prompt`` and ``responses`` alone mean best-first; with ``scores``, ``ranks`` or ``score_key``
    they are canonical. ``unscored`` is never detected: it has to be asked for.
    """
    for name, known in FORMATS.items():
        if all(key in row for key in known.fields):
            if known.listed is not None and not isinstance(row[known.listed], list):
                continue
            if name != "canonical" or _scored(row) or score_key is not None:
                return name
    have = one_line(", ".join(map(str, row)) or "none", 80)
    raise InputError(
        f"{place}: fields of no known format ({have}); known: {', '.join(FORMATS)}; "
        "--columns maps names, e.g. prompt=question"
    )


def _scored(row: Row) -> bool:
    return "scores" in row or "ranks" in row


def check_name(name: str, score_key: str | None = None) -> None:
    """Raise `InputError` for a format that is none, or that has no scores for ``score_key``."""
    if name not in FORMATS:
        near = difflib.get_close_matches(name, FORMATS, 1)
        hint = f", did you mean '{near[0]}'?" if near else f"; known: {', '.join(FORMATS)}"
        raise InputError(f"unknown format '{one_line(name, 40)}'{hint}")
    if score_key is not None and not FORMATS[name].has_scores:
        raise InputError(f"format '{name}' has no scores, so score_key does not apply to it")


def parse(name: str, row: Row, place: Place, score_key: str | None = None) -> ParsedRow:
    """A row of a known format, completed."""
    read = FORMATS[name].read
    assert read is not None, "rows of this format are gathered"
    found = _behind_prompt(read(row, place, score_key))
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
            if pairs.is_said(row[name]) and row[name].strip() not in said:
                raise InputError(
                    f"{place}: the field '{name}' looks like a part of the prompt and is not read; "
                    f"map it (--columns prompt={name}) or leave it out (--columns {name}=)"
                )
    return found


def _behind_prompt(found: ParsedRow) -> ParsedRow:
    """Beside responses of several turns a text prompt is a message of the user; those that repeat
    the prompt's messages begin behind them."""
    asked = found.prompt
    if not any(isinstance(response, list) for response in found.responses):
        return found
    turns = fields.as_messages(asked) if asked else []
    talks = [r for r in found.responses if isinstance(r, list) and r]
    if turns and all(talk[: len(turns)] == turns for talk in talks):
        responses = [
            fields.said(r[len(turns) :]) if isinstance(r, list) and r else r
            for r in found.responses
        ]
        found = found._replace(responses=responses)
    return found._replace(prompt=turns or asked)


def _with_system(prompt: Prompt, system: str, place: Place) -> Prompt:
    turns = fields.as_messages(prompt)
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
    names.update(*PAIR_SCORES, _AB_VERDICTS, ("score_a", "score_b", "winner_model_b"))
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
