"""Records: one prompt with its scored candidates, before any tokeniser.

`read_records` is the only way in, for every format and kind of file. It is an iterator, so a file
need not fit in memory (flat rows do have to be gathered by prompt first). What is wrong with the
file is an `InputError`; what is merely of no use is left out and counted in the `Report`.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastrank.data import formats
from fastrank.data import report as reports
from fastrank.data.fields import Prompt
from fastrank.data.files import Place, RawRow, Row, Source, open_source, parse_row
from fastrank.data.formats import Candidates
from fastrank.data.report import Report
from fastrank.errors import InputError

NORMALIZE_REWARDS = ("none", "group")


@dataclass(frozen=True)
class Record:
    """One prompt with its candidates.

    Attributes:
        prompt: text, or chat messages ``{"role", "content"}``.
        responses: the candidates, in the file's order, each with a character that is not a space.
        scores: one finite number a candidate, higher is better (of ranks: largest rank − rank).
        line: 1-based line of a JSONL file, record number of any other kind.
        id: the record's own name, if it has one.
        positions: which of the source's candidates were kept, as positions among them.
        num_source: how many candidates the source has.
        source: the row as read, for writing results back; None for flat rows.
    """

    prompt: Prompt
    responses: list[str]
    scores: list[float]
    line: int
    id: str | None = None
    positions: tuple[int, ...] = dataclasses.field(default=(), compare=False)
    num_source: int = dataclasses.field(default=0, compare=False)
    source: Row | None = dataclasses.field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Reading:
    """How rows become records; the fields are the options of `read_records`."""

    format: str | None = None
    score_key: str | None = None
    max_candidates: int | None = None
    normalize_rewards: str = "none"
    min_candidates: int = 2

    def __post_init__(self) -> None:
        if self.max_candidates is not None and self.max_candidates < 2:
            raise InputError(f"max_candidates must be at least 2, got {self.max_candidates}")
        if self.normalize_rewards not in NORMALIZE_REWARDS:
            allowed = " or ".join(NORMALIZE_REWARDS)
            raise InputError(f"normalize_rewards must be {allowed}, got '{self.normalize_rewards}'")
        if self.format is not None:
            formats.reader(self.format, self.score_key)


def read_records(
    path: str | Path,
    *,
    format: str | None = None,
    score_key: str | None = None,
    max_candidates: int | None = None,
    normalize_rewards: str = "none",
    min_candidates: int = 2,
    report: Report | None = None,
) -> Iterator[Record]:
    """Yield the usable records of a file, a folder or a Hub data set, in order.

    Args:
        path: a JSONL, JSON or Parquet file, a folder, or a Hub name; see `fastrank.data.files`.
        format: one of `fastrank.data.formats.FORMATS`; by default recognised by the first row's
            fields. ``unscored`` reads prompts and responses alone and gives every candidate 0.
        score_key: the field that holds the score (or list of scores) instead of the format's own.
        max_candidates: keep at most this many of a group: the best, the worst, and the others
            evenly spaced by reward in between (ties by position); their order stays.
        normalize_rewards: "none", or "group": zero mean and unit (population) deviation within each
            group; a group of equal rewards becomes zeros.
        min_candidates: drop records with fewer usable candidates.
        report: counts are added to it.

    Raises:
        InputError: the file cannot be used (its text names the line), an option is wrong, or no
            record at all is usable. Raised while iterating, except for options.
    """
    reading = Reading(format, score_key, max_candidates, normalize_rewards, min_candidates)
    report = Report() if report is None else report
    report.name = report.name or str(path)
    return _records(path, reading, report)


def _records(path: str | Path, reading: Reading, report: Report) -> Iterator[Record]:
    rows, reader = open_records(open_source(path), reading, report)
    for place, raw in rows:
        record = reader.read(place, raw, report)
        if record is not None:
            yield record
    require_records(report)


#: What `open_records` hands to a `RecordReader`: an unparsed row, or one flat group.
Item = RawRow | Candidates


@dataclass(frozen=True)
class RecordReader:
    """Turns items of one file into records; small and picklable, so any process can do it.

    Attributes:
        reading: the options, with the file's format.
        detected: whether the format was recognised rather than asked for.
    """

    reading: Reading
    detected: bool = False

    def candidates(self, place: Place, row: Row) -> Candidates:
        """The prompt and candidates of a row, in the file's format."""
        name, score_key = self.reading.format, self.reading.score_key
        assert name is not None
        if self.detected:
            formats.check_still(name, row, place)
        return formats.reader(name)(row, place, score_key)

    def read(self, place: Place, item: Item, report: Report) -> Record | None:
        """The record of an item, or None if it is of no use (counted in ``report``).

        Raises:
            InputError: the item is malformed; the text names its place.
        """
        row = None if isinstance(item, Candidates) else parse_row(place, item)
        found = self.candidates(place, row) if row is not None else item
        assert isinstance(found, Candidates)
        report.add_read(len(found.responses))
        record = _usable(found, place, row, self.reading, report)
        if record is None:
            return None
        report.keep(record.scores)
        if self.reading.normalize_rewards == "group":
            record = dataclasses.replace(record, scores=standardized(record.scores))
        return record


def open_records(
    source: Source, reading: Reading, report: Report
) -> tuple[Iterator[tuple[Place, Item]], RecordReader]:
    """The items of a source, unparsed where that is possible, and the reader that parses them.

    Reads the first row, to recognise the format; all of them if the format is flat rows, which are
    gathered by prompt here.
    """
    rows = source.raw_rows()
    first = next(rows, None)
    if first is None:
        return iter(()), RecordReader(reading)
    rows = itertools.chain([first], rows)
    detected = reading.format is None
    if detected:
        place, raw = first
        found = formats.detect(parse_row(place, raw), place, reading.score_key)
        reading = dataclasses.replace(reading, format=found)
    report.format = reading.format or ""
    reader = RecordReader(reading, detected)
    if reading.format != "flat":
        return rows, reader
    parsed = ((place, parse_row(place, raw)) for place, raw in rows)
    return gather_flat((place, reader.candidates(place, row)) for place, row in parsed), reader


def require_records(report: Report) -> None:
    """Raise `InputError` if a file that was read to its end left nothing to use."""
    if report.kept:
        return
    if not report.read:
        raise InputError(f"{report.name}: no records in it")
    reasons = ", ".join(f"{len(lines)} {reason}" for reason, lines in report.dropped.items())
    raise InputError(f"{report.name}: no usable record: {report.read} read, {reasons}")


def gather_flat(rows: Iterable[tuple[Place, Candidates]]) -> Iterator[tuple[Place, Candidates]]:
    """Flat rows gathered by prompt, wherever they stand in the file, at the first row's place."""
    groups: dict[str, tuple[Place, Candidates]] = {}
    for place, row in rows:
        key = row.prompt if isinstance(row.prompt, str) else json.dumps(row.prompt)
        if key in groups:
            groups[key][1].responses.extend(row.responses)
            groups[key][1].scores.extend(row.scores)
        else:
            groups[key] = (place, row)
    yield from groups.values()


def _usable(
    found: Candidates, place: Place, row: Row | None, reading: Reading, report: Report
) -> Record | None:
    """Drops what is of no use from one row's candidates, and the row if too few are left."""
    if found.prompt is None:
        report.drop_record(reports.NO_PROMPT, place.line, len(found.responses))
        return None
    positions, responses, scores = [], [], []
    for i, (response, score) in enumerate(zip(found.responses, found.scores, strict=True)):
        if response is None or not response.strip():
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
    return Record(
        found.prompt,
        responses,
        scores,
        place.line,
        id=found.id,
        positions=tuple(positions),
        num_source=len(found.responses),
        source=row,
    )


def spread(scores: Sequence[float], count: int) -> list[int]:
    """Positions of ``count`` (at least 2) scores: best, worst, and evenly by rank between them.

    >>> spread([0.1, 0.9, 0.5, 0.7, 0.3], 3)
    [0, 1, 2]
    """
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    last = len(scores) - 1
    return sorted(order[(k * last + (count - 1) // 2) // (count - 1)] for k in range(count))


def standardized(scores: Sequence[float]) -> list[float]:
    """Scores with zero mean and unit population deviation; zeros if they are all equal.

    >>> standardized([1.0, 3.0])
    [-1.0, 1.0]
    """
    if len(set(scores)) < 2:
        return [0.0] * len(scores)
    mean = statistics.fmean(scores)
    deviation = statistics.pstdev(scores)
    if not deviation:  # a spread below the smallest float
        return [0.0] * len(scores)
    return [(score - mean) / deviation for score in scores]
