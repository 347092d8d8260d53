"""Checked values out of a row: texts, messages, scores.

Every function takes the row's place and raises `InputError` with it, so that a message names the
line, the field, what was expected and what came.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from fastrank.data.files import Place, one_line
from fastrank.errors import InputError

Message = dict[str, str]
Prompt = str | list[Message]

#: Rewards are float32 further on; a larger one would silently become infinite there.
_LARGEST = 3.4028234663852886e38


def shown(value: Any) -> str:
    """A value as it appears in a message: short, on one line, with its type."""
    return f"{one_line(repr(value), 40)} ({type(value).__name__})"


def text(value: Any, place: Place, what: str) -> str:
    """A string of valid Unicode."""
    if not isinstance(value, str):
        raise InputError(f"{place}: {what} is {shown(value)}, expected text")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            bad = f"a lone surrogate at character {error.start + 1}"
            raise InputError(f"{place}: {what} holds {bad}, expected valid Unicode") from error
    return value


def content(value: Any, place: Place, what: str) -> str:
    """A message's content: text, or a list of text parts, which are joined."""
    if isinstance(value, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in value]
        return "".join(text(part, place, f"{what}[{i}]") for i, part in enumerate(parts))
    return text(value, place, what)


def is_messages(value: Any) -> bool:
    """Whether a value has the shape of a list of chat messages."""
    return isinstance(value, list) and all(isinstance(m, dict) and "role" in m for m in value)


def messages(value: Sequence[Any], place: Place, what: str) -> list[Message]:
    """Chat messages reduced to role and content."""
    out = []
    for i, message in enumerate(value):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            expected = 'a message {"role", "content"}'
            raise InputError(f"{place}: {what}[{i}] is {shown(message)}, expected {expected}")
        out.append(
            {
                "role": text(message["role"], place, f"{what}[{i}].role"),
                "content": content(message["content"], place, f"{what}[{i}].content"),
            }
        )
    return out


def prompt(value: Any, place: Place, what: str) -> Prompt | None:
    """A prompt: text, or chat messages. None for null and for an empty list."""
    if value is None or value == []:
        return None
    if isinstance(value, list):
        return messages(value, place, what)
    if not isinstance(value, str):
        raise InputError(f"{place}: {what} is {shown(value)}, expected text or a list of messages")
    return text(value, place, what)


def response(value: Any, place: Place, what: str) -> str | None:
    """A response: text, one message, or a list of one message. None for null."""
    if value is None:
        return None
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list):
        if len(value) != 1:
            raise InputError(f"{place}: {what} has {len(value)} messages, expected one")
        return messages(value, place, what)[0]["content"]
    return text(value, place, what)


def number(value: Any, place: Place, what: str) -> float | None:
    """A finite number that float32 can hold. None for null."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float, Decimal)):
        raise InputError(f"{place}: {what} is {shown(value)}, expected a number")
    try:
        converted = float(value)
    except OverflowError:
        converted = math.inf
    if not abs(converted) <= _LARGEST:
        raise InputError(f"{place}: {what} is {one_line(value, 40)}, expected a finite number")
    return converted


def listed(value: Any, place: Place, what: str) -> list[Any]:
    """A list; null counts as an empty one."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise InputError(f"{place}: {what} is {shown(value)}, expected a list")
    return value


def numbers(value: Any, length: int, place: Place, what: str, beside: str) -> list[float | None]:
    """A list of numbers as long as another field's; null stands for a list of nulls."""
    if value is None:
        return [None] * length
    items = listed(value, place, what)
    if len(items) != length:
        raise InputError(f"{place}: {what} has {len(items)} entries, {beside} has {length}")
    return [number(item, place, f"{what}[{i}]") for i, item in enumerate(items)]


def field_of(row: dict[str, Any], key: str, place: Place) -> Any:
    """The value of a field that the row's format cannot do without."""
    if key not in row:
        have = ", ".join(map(str, row)) or "none"
        raise InputError(f"{place}: expected a field '{key}', got {one_line(have, 80)}")
    return row[key]
