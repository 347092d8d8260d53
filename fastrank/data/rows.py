"""A row: where it came from, and how its JSON is read.

What one JSON text may become in memory is bounded.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, NamedTuple

from fastrank.errors import InputError, one_line

Row = dict[str, Any]
#: A row as it comes: the bytes of a JSON object, or the object.
RawRow = bytes | Row

#: Bytes of memory that one JSON text may become, if that is more than ten times its size.
MOST_OBJECTS = 1 << 30
_SMALL_JSON = 4 << 20


class Place(NamedTuple):
    """Where a row came from; its text is how every message about it begins."""

    name: str
    line: int
    unit: str = "line"

    def __str__(self) -> str:
        return f"{self.name}, {self.unit} {self.line}"


#: Some of a source's rows. Can be iterated more than once and sent to another process, except for
#: those of an iterable that the caller gave.
Piece = Iterable[tuple[Place, RawRow]]


def parse_row(place: Place, raw: RawRow) -> Row:
    """A row of `Source.pieces` as a dictionary.

    Raises:
        InputError: malformed JSON, or no object; the text names the place.
    """
    value = parse_json(raw, str(place)) if isinstance(raw, bytes) else raw
    if not isinstance(value, dict):
        raise InputError(f"{place}: expected a JSON object, got {type(value).__name__}")
    return value


def parse_json(text: bytes, place: str) -> Any:
    _check_expansion(text, place)
    try:
        return json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(f"{place}: not UTF-8 text (byte {error.start + 1})") from error
    except json.JSONDecodeError as error:
        where = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}"
        raise InputError(f"{place}: malformed JSON: {error.msg} ({where})") from error
    except RecursionError as error:
        raise InputError(f"{place}: malformed JSON: nested too deeply") from error
    except ValueError as error:  # an integer of thousands of digits
        raise InputError(f"{place}: malformed JSON: {one_line(error)}") from error


def _check_expansion(text: bytes, place: str) -> None:
    """Refuse JSON whose objects would take far more memory than records of its size do: a line
    ``{},{},...`` of 157 MB took 4.4 GB."""
    if len(text) < _SMALL_JSON:
        return
    held = 200 * (text.count(b"{") + text.count(b"[")) + 60 * text.count(b",")
    if held > max(MOST_OBJECTS, 10 * len(text)):
        raise InputError(
            f"{place}: its {len(text) >> 20} MiB would become about {held >> 20} MiB of lists and "
            "objects, no records of text"
        )
