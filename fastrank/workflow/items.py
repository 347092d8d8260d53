"""Rows of a record file as the workflow passes them on: any format in, canonical records out.

Unlike `fastrank.data.records`, which reads for training, nothing that is incomplete is left out:
a row may have a prompt alone (before sampling) or responses without scores (before rewarding). All
other fields of a row travel along unchanged.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from fastrank.data import fields, formats
from fastrank.data.fields import Ends, Prompt, Said
from fastrank.data.files import matching_files, read_rows
from fastrank.data.manifest import content_hash, value_checksum
from fastrank.data.readers import ParsedRow
from fastrank.data.records import Record
from fastrank.data.rows import Place, Row
from fastrank.errors import InputError
from fastrank.options import TemplateOptions
from fastrank.options.paths import local_path

#: A row with one of these and no responses is a prompt to sample for.
_PROMPT_KEYS = ("prompt", "query", "instruction")

#: What a canonical record says itself, and what would contradict it.
_OWN = {"prompt", "responses", "scores", "ranks", "sources", "ended"}

#: The source of a response that was in the file and does not say where it came from.
FROM_DATA = "data"


#: One reward per response; None for a response without one.
Scores = list[float | None]


@dataclass(frozen=True)
class PromptItem:
    """One prompt with the responses it has so far.

    Attributes:
        place: where the row stands, for messages.
        prompt: text, or chat messages.
        responses: those in the file that are not blank: texts, or messages where they say more.
        scores: one per response; None where the file gives none.
        sources: what made each response: a model's path, or "data".
        ended: whether each response came to its end; False for one cut at a limit, None where the
            file does not say.
        num_blank: null and blank responses that were left out.
        extra: the row's other fields.
        named: responses by the field that they were read from, where it names them: ``chosen``.
    """

    place: Place
    prompt: Prompt
    responses: Sequence[Said]
    scores: Scores
    sources: list[str]
    ended: Ends
    num_blank: int = 0
    extra: Row = field(default_factory=dict, repr=False)
    named: dict[str, list[str]] = field(default_factory=dict, repr=False)

    @property
    def tools(self) -> list[Any] | None:
        """Descriptions of the tools that the prompt offers."""
        return fields.tools(self.extra.get("tools"), self.place)

    def take(self, kept: Sequence[int]) -> PromptItem:
        """The item with the responses at the positions ``kept``, in that order."""
        return replace(
            self,
            responses=[self.responses[i] for i in kept],
            scores=[self.scores[i] for i in kept],
            sources=[self.sources[i] for i in kept],
            ended=[self.ended[i] for i in kept],
        )

    def as_record(self) -> Record:
        """The record that training would read; no score counts as 0."""
        whole = any(not isinstance(response, str) for response in self.responses)
        return Record(
            self.prompt,
            [fields.said_text(response) for response in self.responses],
            [0.0 if score is None else score for score in self.scores],
            self.place.line,
            positions=tuple(range(len(self.responses))),
            turns=tuple(self.responses) if whole else (),
            tools=self.tools,
            ended=tuple(whole is not False for whole in self.ended),
        )

    def texts(self, why: str) -> list[str]:
        """The responses, where a text is all that can be read; ``why`` says of whom.

        Raises:
            InputError: one is a message that says more, or several.
        """
        for number, response in enumerate(self.responses, start=1):
            if not isinstance(response, str):
                what = "messages of several turns"
                if isinstance(response, dict):
                    keys = ", ".join(key for key in response if key not in ("role", "content"))
                    what = f"a message with {keys}"
                raise InputError(f"{self.place}: response {number} is {what}, and {why}")
        return [response for response in self.responses if isinstance(response, str)]

    def as_row(self) -> Row:
        """The canonical record."""
        row = {
            **self.extra,
            "prompt": self.prompt,
            "responses": list(self.responses),
            "scores": self.scores,
            "sources": self.sources,
        }
        known = any(whole is not None for whole in self.ended)
        return row | ({"ended": fields.end_names(self.ended)} if known else {})


def read_items(
    path: str | Path,
    *,
    format: str | None = None,
    columns: str | Mapping[str, str] | None = None,
) -> Iterator[PromptItem]:
    """Yield the rows of a file, a folder or a Hub data set that have a prompt, in order.

    Args:
        path: see `fastrank.data.files.read_rows`.
        format: one of `fastrank.data.formats.FORMATS`; by default told from each row's fields.
        columns: see `fastrank.data.records.read_records`.

    Raises:
        InputError: the file cannot be used; its text names the line.
    """
    if format is not None:
        formats.check_name(format)
    waiting: dict[str, list[tuple[Place, Row]]] = {}
    num_rows = num_items = 0
    pairs = formats.columns(columns)
    for place, given in read_rows(path):
        if not num_rows:
            formats.check_columns(pairs, given, place)
        num_rows += 1
        row = formats.renamed(given, pairs)
        name = format or _format_of(row, place)
        if name is not None and formats.FORMATS[name].gather is not None:
            waiting.setdefault(name, []).append((place, row))
            continue
        item = _item(place, row, name)
        if item is not None:
            num_items += 1
            # What `train` would read, or refuse, stays out of what is written as well.
            known = {*formats.column_names(), *formats.PROMPT_LIKE}
            unread = {
                key: given[key]
                for key, theirs in pairs
                if not theirs and key in given and key not in known
            }
            yield replace(item, extra=item.extra | unread)
    for name, rows in waiting.items():
        known_format = formats.FORMATS[name]
        assert known_format.gather is not None
        for place, found in known_format.gather(rows, None):
            if found.prompt is not None:
                num_items += 1
                extra = {} if found.tools is None else {"tools": found.tools}
                yield _build(place, found, extra, known_format.has_scores)
    if not num_items:
        raise InputError(f"{path}: no prompt in its {num_rows} records")


def _format_of(row: Row, place: Place) -> str | None:
    """The format of a row, None for one that has a prompt alone."""
    try:
        return formats.detect(row, place)
    except InputError:
        if any(row.get(key) is not None for key in _PROMPT_KEYS):
            return None
        raise


def _item(place: Place, row: Row, name: str | None) -> PromptItem | None:
    if name is None:
        key = next(key for key in _PROMPT_KEYS if row.get(key) is not None)
        found = ParsedRow(fields.prompt(row[key], place, key), [], [])
        found = formats.complete(found, row, place, (key,))
        used = {key}
    else:
        found = formats.parse(name, row, place)
        used = {*formats.FORMATS[name].fields, *_score_fields(name)}
    if found.refused is not None:
        _say_once(f"{place}: left out: {found.refused}")
    if found.prompt is None or found.refused is not None:
        return None
    used |= {"system"}  # a message of the prompt by now
    extra = {key: value for key, value in row.items() if key not in used | _OWN}
    has_scores = name is not None and formats.FORMATS[name].has_scores
    return _build(place, found, extra, has_scores, _sources(row, place, len(found.responses)))


@cache
def _say_once(line: str) -> None:
    """Log what is left out; a file is read several times."""
    logging.getLogger(__name__).warning(line)


def _score_fields(name: str) -> tuple[str, ...]:
    """Fields with a format's scores, which the canonical ``scores`` replace."""
    return {"pro": ("reward",), "all_rm_scores": ("all_rm_scores",)}.get(name, ())


def _sources(row: Row, place: Place, length: int) -> list[str]:
    if row.get("sources") is None:
        return [FROM_DATA] * length
    items = fields.listed(row["sources"], place, "sources")
    if len(items) != length:
        raise InputError(f"{place}: sources has {len(items)} entries, responses has {length}")
    return [fields.text(item, place, f"sources[{i}]") for i, item in enumerate(items)]


def _build(
    place: Place,
    found: ParsedRow,
    extra: Row,
    has_scores: bool,
    sources: Sequence[str] | None = None,
) -> PromptItem:
    assert found.prompt is not None
    texts, scores, origins, ends = [], [], [], []
    origin = sources or [FROM_DATA] * len(found.responses)
    ended = found.ended or [None] * len(found.responses)
    for response, score, source, whole in zip(
        found.responses, found.scores, origin, ended, strict=True
    ):
        if response and not fields.is_blank(response):
            texts.append(response)
            scores.append(score if has_scores else None)  # an order alone is no reward
            origins.append(source)
            ends.append(whole)
    blank = len(found.responses) - len(texts)
    named: dict[str, list[str]] = {}
    for name, response in zip(found.names, found.responses, strict=False):
        if response:
            named.setdefault(name, []).append(fields.said_text(response).strip())
    return PromptItem(place, found.prompt, texts, scores, origins, ends, blank, extra, named)


def as_line(row: Row) -> str:
    """A row as one line of JSON; what JSON cannot hold (a date of a Parquet file) as text."""

    def plain(value: Any) -> str:
        return str(value)

    return json.dumps(row, ensure_ascii=False, default=plain) + "\n"


def check_distinct(source: str, option: str, output: str) -> None:
    """Refuse an output that is the input: an interrupted run could not be taken up again."""
    first, second = local_path(source), local_path(output)
    if first.exists() and second.exists() and first.samefile(second):
        raise InputError(f"--output must be another file than {option}, got {output} for both")


def template_identity(given: TemplateOptions) -> list[Any]:
    """What tells one way of rendering a prompt from another: a template's file by its content."""
    template = given.chat_template and file_identity(given.chat_template)
    return [given.as_chat, template, given.chat_template_kwargs]


def file_identity(path: str) -> str:
    """Hash of a file's content, or of all files that a pattern matches; of a folder or a Hub name,
    the name."""
    local = local_path(path)
    if local.is_file():
        return content_hash(local)
    matched = matching_files(path)
    return (
        value_checksum([[file, content_hash(Path(file))] for file in matched]) if matched else path
    )
