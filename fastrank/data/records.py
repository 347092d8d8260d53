"""Records: one prompt with its scored candidates, before any tokeniser.

`read_records` reads every format and kind of file. It is an iterator, so a file need not fit in
memory (flat rows do have to be gathered by prompt first). A malformed file is an `InputError`; a
record that is merely of no use is left out and counted in the `Report`.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from fastrank.data import fields, formats
from fastrank.data import report as reports
from fastrank.data.fields import Prompt, Said
from fastrank.data.files import Source, open_source, slices
from fastrank.data.readers import ParsedRow, weights
from fastrank.data.report import Report
from fastrank.data.rows import Place, RawRow, Row, parse_row
from fastrank.errors import InputError

NormalizeRewards = Literal["none", "group"]


@dataclass(frozen=True)
class Record:
    """One prompt with its candidates.

    Attributes:
        prompt: text, or chat messages: ``{"role", "content"}`` and what else the file has of them.
        responses: the candidates' texts, in the file's order, each with a character that is not a
            space unless its turn calls a tool.
        scores: one finite number per candidate, higher is better (of ranks: largest rank − rank).
        line: 1-based line of a JSONL file, record number of any other kind.
        id: the record's own name, if it has one.
        positions: which of the source's candidates were kept, as positions among them.
        num_source: how many candidates the source has.
        turns: the candidates with whole messages for those that say more than their text; empty if
            none does. Of a candidate of several turns, the assistant's are ranked.
        tools: descriptions of the tools that the chat template shows to the model.
        ended: whether each candidate came to its end; one that was cut at a limit is not taught an
            end. Empty if none was cut.
        source: the row as read, for writing results back; None for flat rows.
    """

    prompt: Prompt
    responses: list[str]
    scores: list[float]
    line: int
    id: str | None = None
    positions: tuple[int, ...] = dataclasses.field(default=(), compare=False)
    num_source: int = dataclasses.field(default=0, compare=False)
    turns: tuple[Said, ...] = ()
    tools: list[Any] | None = None
    ended: tuple[bool, ...] = ()
    source: Row | None = dataclasses.field(default=None, compare=False, repr=False)

    @property
    def is_masked(self) -> bool:
        """Whether some candidate has several turns, so that not all of it is ranked."""
        return any(isinstance(turns, list) for turns in self.turns)


@dataclass(frozen=True)
class Reading:
    """How rows become records; the fields are the options of `read_records`."""

    format: str | None = None
    score_key: Any = None
    max_candidates: int | None = None
    normalize_rewards: NormalizeRewards = "none"
    min_candidates: int = 2
    columns: Any = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", formats.columns(self.columns))
        if isinstance(self.score_key, Mapping):
            object.__setattr__(self, "score_key", json.dumps(dict(self.score_key)))
        if self.score_key is not None:
            weights(self.score_key)
        if self.max_candidates is not None and self.max_candidates < 2:
            raise InputError(f"max_candidates must be at least 2, got {self.max_candidates}")
        if self.normalize_rewards not in get_args(NormalizeRewards):
            allowed = " or ".join(get_args(NormalizeRewards))
            raise InputError(f"normalize_rewards must be {allowed}, got '{self.normalize_rewards}'")
        if self.format is not None:
            formats.check_name(self.format, self.score_key)


def read_records(
    source: Any,
    *,
    format: str | None = None,
    score_key: str | Mapping[str, float] | None = None,
    max_candidates: int | None = None,
    normalize_rewards: NormalizeRewards = "none",
    min_candidates: int = 2,
    columns: str | Mapping[str, str] | None = None,
    report: Report | None = None,
) -> Iterator[Record]:
    """Yield the usable records of a file or data set, in order.

    Args:
        source: a file, a folder, a Hub name, a `datasets.Dataset` or an iterable of dictionaries;
            see `fastrank.data.files.open_source`.
        format: one of `fastrank.data.formats.FORMATS`; by default recognised by the first row's
            fields. ``unscored`` reads prompts and responses alone and gives every candidate 0.
        score_key: the field that holds the score (or list of scores) instead of the format's own;
            or several with weights, as a mapping or a JSON object: the score is their weighted sum.
        max_candidates: keep at most this many of a group: the best, the worst, and the others
            evenly spaced by reward in between (ties by position); their order stays.
        normalize_rewards: "none", or "group": zero mean and unit (population) deviation within each
            group; a group of equal rewards becomes zeros.
        min_candidates: drop records with fewer usable candidates.
        columns: names of the file's fields by the names that the formats know, as a mapping or a
            text such as ``"prompt=question,system=role"``; an empty name leaves a field out.
        report: counts are added to it.

    Raises:
        InputError: the file cannot be used (its text names the line), an option is wrong, or no
            record at all is usable. Raised while iterating, except for options.
    """
    reading = Reading(format, score_key, max_candidates, normalize_rewards, min_candidates, columns)
    return _records(source, reading, Report() if report is None else report)


def _records(source: Any, reading: Reading, report: Report) -> Iterator[Record]:
    opened = open_source(source)
    report.name = report.name or opened.name
    pieces, reader = open_records(opened, reading, report)
    for place, raw in itertools.chain.from_iterable(pieces):
        record = reader.read(place, raw, report)
        if record is not None:
            yield record
    require_records(report)


#: What a `RecordReader` reads: a row as it comes, or the gathered rows of one flat group.
Unread = RawRow | ParsedRow


@dataclass(frozen=True)
class RecordReader:
    """Turns the rows of one file into records; small and picklable, so any process can do it.

    Attributes:
        reading: the options, with the file's format.
        detected: whether the format was recognised rather than asked for.
    """

    reading: Reading
    detected: bool = False

    def renamed(self, place: Place, row: Row) -> Row:
        """A row under the names of the file's format."""
        assert self.reading.format is not None
        row = formats.renamed(row, self.reading.columns)
        if self.detected:
            formats.check_still(self.reading.format, row, place)
        return row

    def read(self, place: Place, unread: Unread, report: Report) -> Record | None:
        """The record of a row, or None if it is of no use (counted in ``report``).

        Raises:
            InputError: the row is malformed; the text names its place.
        """
        if isinstance(unread, ParsedRow):
            row, found = None, unread
        else:
            row = parse_row(place, unread)
            name = self.reading.format
            assert name is not None
            found = formats.parse(name, self.renamed(place, row), place, self.reading.score_key)
        report.add_read(len(found.responses))
        record = _usable(found, place, row, self.reading, report)
        if record is None:
            return None
        report.keep(record.scores)
        if self.reading.normalize_rewards == "group":
            record = dataclasses.replace(record, scores=standardized(record.scores))
        return record


def open_records(
    source: Source, reading: Reading, report: Report, count: int = 1
) -> tuple[Sequence[Iterable[tuple[Place, Unread]]], RecordReader]:
    """A source's rows as at most ``count`` pieces, and the reader that makes records of them.

    Reads the first row, to recognise the format; all of them if the format is flat rows, which are
    gathered by prompt here.
    """
    pieces: Sequence[Iterable[tuple[Place, RawRow]]] = source.pieces(count)
    rows = itertools.chain.from_iterable(pieces)
    first = next(rows, None)
    if first is None:
        return [], RecordReader(reading)
    if len(pieces) == 1:  # read on from here; several are opened again where they are read
        pieces = [itertools.chain([first], rows)]
    detected = reading.format is None
    place, raw = first
    if reading.columns:
        formats.check_columns(reading.columns, parse_row(place, raw), place)
    if detected:
        row = formats.renamed(parse_row(place, raw), reading.columns)
        found = formats.detect(row, place, reading.score_key)
        reading = dataclasses.replace(reading, format=found)
    report.format = reading.format or ""
    reader = RecordReader(reading, detected)
    gather = formats.FORMATS[reading.format or ""].gather
    if gather is None:
        return pieces, reader
    rows = itertools.chain.from_iterable(pieces)
    parsed = ((place, reader.renamed(place, parse_row(place, raw))) for place, raw in rows)
    return slices(list(gather(parsed, reading.score_key)), count), reader


def require_records(report: Report) -> None:
    """Raise `InputError` if a file that was read to its end left nothing to use."""
    if report.kept:
        return
    if not report.read:
        raise InputError(f"{report.name}: no records in it")
    reasons = ", ".join(f"{len(lines)} {reason}" for reason, lines in report.dropped.items())
    raise InputError(f"{report.name}: no usable record: {report.read} read, {reasons}")


def _usable(
    found: ParsedRow, place: Place, row: Row | None, reading: Reading, report: Report
) -> Record | None:
    """The usable candidates of a row; None, the row dropped, if too few are left."""
    if found.prompt is None or found.refused is not None:
        reason = found.refused or reports.NO_PROMPT
        report.drop_record(reason, place.line, len(found.responses))
        return None
    positions: list[int] = []
    responses: list[Said] = []
    scores: list[float] = []
    for i, (response, score) in enumerate(zip(found.responses, found.scores, strict=True)):
        if response == []:
            report.drop_candidate(reports.NO_TURN, place.line)
        elif response is None or fields.is_blank(response):
            report.drop_candidate(reports.EMPTY_RESPONSE, place.line)
        elif score is None:
            report.drop_candidate(reports.NO_SCORE, place.line)
        else:
            positions.append(i)
            responses.append(response)
            scores.append(score)
    if len(responses) < reading.min_candidates:
        reason = reports.FEW_CANDIDATES.format(minimum=reading.min_candidates)
        report.drop_record(reason, place.line, len(responses))
        return None
    if reading.max_candidates is not None and len(scores) > reading.max_candidates:
        kept = spread(scores, reading.max_candidates)
        report.drop_candidate(reports.BEYOND_MAXIMUM, place.line, len(scores) - len(kept))
        positions = [positions[i] for i in kept]
        responses = [responses[i] for i in kept]
        scores = [scores[i] for i in kept]
    if found.taught is not None:
        order = _taught_first(found.taught, positions, scores)
        if order is None:
            report.note(reports.NOT_TAUGHT, place.line)
        else:
            positions = [positions[i] for i in order]
            responses = [responses[i] for i in order]
            scores = [scores[i] for i in order]
    ended = [] if found.ended is None else [found.ended[i] is not False for i in positions]
    report.count(reports.CUT_SAMPLE, place.line, ended.count(False))
    for what in found.counts:
        report.count(what, place.line)
    return Record(
        found.prompt,
        [fields.said_text(response) for response in responses],
        scores,
        place.line,
        id=found.id,
        positions=tuple(positions),
        num_source=len(found.responses),
        turns=tuple(responses) if any(not isinstance(r, str) for r in responses) else (),
        tools=found.tools,
        ended=() if all(ended) else tuple(ended),
        source=row,
    )


def _taught_first(
    taught: int, positions: Sequence[int], scores: Sequence[float]
) -> list[int] | None:
    """An order in which the candidate at position ``taught`` is the first of the best, the one
    that the supervised term takes; None if it is not among the best."""
    best = max(scores)
    at = positions.index(taught) if taught in positions else None
    if at is None or scores[at] < best:
        return None
    first = scores.index(best)
    return sorted(range(len(scores)), key=lambda i: i != at and at != first)


def spread(scores: Sequence[float], count: int) -> list[int]:
    """Positions of ``count`` (at least 2) scores: best, worst, and evenly by rank between them.

    >>> spread([0.1, 0.9, 0.5, 0.7, 0.3], 3)
    [0, 1, 2]
    """
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    last = len(scores) - 1
    return sorted(order[(k * last + (count - 1) // 2) // (count - 1)] for k in range(count))


def narrowed(scores: Sequence[float]) -> list[float]:
    """Scores that float32 holds in the same order: what is different stays different.

    Where rounding would make some of a group's scores equal, all of them are counted from the
    lowest: every loss of the library has the gradient that it had (LIRE another constant), and a
    function of one's own sees the shifted ones. What still is equal then, a small step beside a
    large one, is kept apart by a unit in the last place.

    >>> narrowed([1000000001.0, 1000000003.0])
    [0.0, 2.0]
    """
    if len(set(array("f", scores))) == len(set(scores)):
        return list(scores)
    low = min(scores)
    shifted = [score - low for score in scores]
    holds = max(shifted) <= float(np.finfo(np.float32).max)
    return _kept_apart(shifted if holds else scores, scores, np.float32)


def _kept_apart(values: Sequence[float], scores: Sequence[float], kind: Any) -> list[float]:
    """``values``, which rise with ``scores`` but may be equal where those are not, as floats of a
    kind that are not."""
    place = {score: i for i, score in enumerate(sorted(set(scores)))}
    found = np.empty(len(place), dtype=kind)
    for value, score in zip(values, scores, strict=True):
        found[place[score]] = value
    least = np.finfo(kind).tiny  # subnormal numbers may count as 0 on a device
    for i in range(1, len(found)):
        if not found[i] > found[i - 1]:
            with np.errstate(over="ignore"):
                above = np.nextafter(found[i - 1], kind(np.inf))
            found[i] = above if found[i - 1] else least
    if np.isinf(found[-1]):
        found[-1] = np.finfo(kind).max
        for i in range(len(found) - 2, -1, -1):
            found[i] = min(found[i], np.nextafter(found[i + 1], kind(-np.inf)))
    return [float(found[place[score]]) for score in scores]


def standardized(scores: Sequence[float]) -> list[float]:
    """Scores with zero mean and unit population deviation; zeros if they are all equal.

    >>> standardized([1.0, 3.0])
    [-1.0, 1.0]
    """
    if len(set(scores)) < 2:
        return [0.0] * len(scores)
    mean = statistics.fmean(scores)
    deviation = statistics.pstdev(scores)
    # 0 for a spread below the smallest float; the scores are kept apart below.
    found = [(score - mean) / deviation if deviation else 0.0 for score in scores]
    if len(set(found)) < len(set(scores)):
        return _kept_apart(found, scores, np.float64)
    return found
