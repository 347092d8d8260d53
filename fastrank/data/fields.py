"""Checked values out of a row: texts, messages, scores.

Every function takes the row's place and raises `InputError` with it, so that a message names the
line, the field, what was expected and what came.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from fastrank.data.rows import Place
from fastrank.errors import InputError, one_line

#: ``role`` and ``content`` are text; all other fields are as the file has them.
Message = dict[str, Any]
Prompt = str | list[Message]
#: A response: its text, a whole message where that says more than a text, or several turns, the
#: last of which is the assistant's.
Said = str | Message | list[Message]

#: Fields of a message with text beside its content.
REASONING = ("reasoning_content", "thinking", "reasoning")

#: Who speaks the turns that are ranked, and who never speaks one.
_ASSISTANTS = {"assistant", "model", "gpt", "bot"}
_OTHERS = {"user", "system", "developer", "tool", "function", "ipython"}
#: Whether each response came to its end (False: it was cut at a limit); None where unknown.
Ends = list[bool | None]

_ENDS = {"stop": True, "length": False}

#: Largest reward: losses take sums and squares of their differences in float32. The operators
#: allow ten times as much, because `fastrank.data.records.narrowed` may shift rewards.
LARGEST_REWARD = 1e15


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


def structs(value: Any) -> Any:
    """A struct of lists, as `datasets` stores a list of structs, as that list; others as they are.

    >>> structs({"role": ["user", "assistant"], "content": ["a", "b"]})
    [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}]
    """
    if not isinstance(value, dict) or not value:
        return value
    columns = list(value.values())
    if not all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
        return value
    return [dict(zip(value, items, strict=True)) for items in zip(*columns, strict=True)]


#: Roles of ShareGPT's messages, ``{"from", "value"}``.
_SHAREGPT = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "observation": "tool"}


def is_messages(value: Any) -> bool:
    """Whether a value has the shape of a list of chat messages, ShareGPT's among them."""
    return isinstance(value, list) and all(
        isinstance(m, dict) and ("role" in m or ("from" in m and "value" in m)) for m in value
    )


def messages(value: Sequence[Any], place: Place, what: str) -> list[Message]:
    """Chat messages with all of their fields, less those that are null.

    Beside ``tool_calls`` the content may be null or absent, which becomes an empty text; arguments
    of calls that are a JSON object as text, OpenAI's form, become that object, which is what chat
    templates expect.
    """
    return [_message(message, place, f"{what}[{i}]") for i, message in enumerate(value)]


def _message(value: Any, place: Place, what: str) -> Message:
    if isinstance(value, dict) and "role" not in value and "from" in value and "value" in value:
        role = text(value["from"], place, f"{what}.from")
        rest = {key: item for key, item in value.items() if key not in ("from", "value")}
        value = {"role": _SHAREGPT.get(role, role), "content": value["value"], **rest}
    calls = isinstance(value, dict) and value.get("tool_calls") or None
    if not isinstance(value, dict) or "role" not in value or not ("content" in value or calls):
        expected = 'a message {"role", "content"}'
        raise InputError(f"{place}: {what} is {shown(value)}, expected {expected}")
    spoken = value.get("content")
    message: Message = {
        "role": text(value["role"], place, f"{what}.role"),
        "content": "" if spoken is None and calls else content(spoken, place, f"{what}.content"),
    }
    for key, item in value.items():
        if item is not None and key not in message:
            message[key] = _valid(item, place, f"{what}.{key}")
    if calls:
        items = listed(calls, place, f"{what}.tool_calls")
        message["tool_calls"] = [
            _call(item, place, f"{what}.tool_calls[{i}]") for i, item in enumerate(items)
        ]
    return message


def _call(value: Any, place: Place, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{place}: {what} is {shown(value)}, expected an object")
    inner = value.get("function")
    if isinstance(inner, dict):
        return {**value, "function": _call(inner, place, f"{what}.function")}
    arguments = value.get("arguments")
    if not isinstance(arguments, str):
        return value
    try:
        parsed = json.loads(arguments)
    except ValueError:
        return value
    return {**value, "arguments": parsed} if isinstance(parsed, dict) else value


def _valid(value: Any, place: Place, what: str) -> Any:
    """The value, if all texts in it are valid Unicode."""
    if isinstance(value, str):
        text(value, place, what)
    elif isinstance(value, dict):
        for key, item in value.items():
            _valid(item, place, f"{what}.{key}")
    elif isinstance(value, list):
        for i, item in enumerate(value):
            _valid(item, place, f"{what}[{i}]")
    return value


def tools(value: Any, place: Place, what: str = "tools") -> list[Any] | None:
    """Descriptions of tools, as a list or as its JSON text. None for null and for an empty list."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except ValueError as error:
            expected = "a list of tools or its JSON text"
            raise InputError(f"{place}: {what} is {shown(value)}, expected {expected}") from error
    items = listed(value, place, what)
    for i, item in enumerate(items):
        if not isinstance(item, dict):
            raise InputError(f"{place}: {what}[{i}] is {shown(item)}, expected an object")
        _valid(item, place, f"{what}[{i}]")
    return items or None


def prompt(value: Any, place: Place, what: str) -> Prompt | None:
    """A prompt: text, or chat messages. None for null and for an empty list."""
    if value is None or value == []:
        return None
    value = structs(value)
    if isinstance(value, list):
        return messages(value, place, what)
    if not isinstance(value, str):
        raise InputError(f"{place}: {what} is {shown(value)}, expected text or a list of messages")
    return text(value, place, what)


def as_messages(prompt: Prompt) -> list[Message]:
    """A prompt as chat messages; a text is one message of the user."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def response(value: Any, place: Place, what: str) -> Said | None:
    """A response: text, one message, or a list of messages. None for null and for no message."""
    if value is None:
        return None
    value = structs(value)
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list):
        return said(messages(value, place, what))
    return text(value, place, what)


def said(turns: Sequence[Message]) -> Said | None:
    """Messages as a response, up to the assistant's last: of one its content, if it says nothing
    else. None for no message; an empty list if no turn is the assistant's. A message alone is,
    unless its role is known to be another's."""
    if not turns:
        return None
    if len(turns) == 1 and not is_known_role(turns[0]):
        turns = [{**turns[0], "role": "assistant"}]
    own = [i for i, turn in enumerate(turns) if not is_context(turn)]
    kept = list(turns[: own[-1] + 1]) if own else []
    if len(kept) != 1:
        return kept
    return kept[0]["content"] if kept[0].keys() == {"role", "content"} else kept[0]


def is_known_role(turn: Message) -> bool:
    """Whether it is known who speaks."""
    return turn["role"] in _OTHERS | _ASSISTANTS


def is_context(turn: Message) -> bool:
    """Whether a turn is not the assistant's."""
    return turn["role"] not in _ASSISTANTS


def as_turns(response: Said) -> list[Message]:
    """A response as messages."""
    if isinstance(response, str):
        return [{"role": "assistant", "content": response}]
    return [response] if isinstance(response, dict) else response


def said_text(response: Said) -> str:
    """The text of a response: of several turns, that of the assistant's."""
    if isinstance(response, str):
        return response
    own = [turn["content"] for turn in as_turns(response) if not is_context(turn)]
    return "\n\n".join(own)


def is_blank(response: Said) -> bool:
    """Whether a response says nothing: neither a text nor a call of a tool."""
    if not isinstance(response, str):
        if any(turn.get("tool_calls") for turn in as_turns(response) if not is_context(turn)):
            return False
    return not said_text(response).strip()


def number(value: Any, place: Place, what: str) -> float | None:
    """A finite number, at most `LARGEST_REWARD`. None for null."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float, Decimal)):
        raise InputError(f"{place}: {what} is {shown(value)}, expected a number")
    try:
        converted = float(value)
    except OverflowError:
        converted = math.inf
    if not abs(converted) <= LARGEST_REWARD:
        raise InputError(
            f"{place}: {what} is {one_line(value, 40)}, expected a finite number within "
            f"±{LARGEST_REWARD:g}"
        )
    return converted


def listed(value: Any, place: Place, what: str) -> list[Any]:
    """A list, or a struct of lists as a list of structs; null counts as an empty one."""
    if value is None:
        return []
    value = structs(value)
    if not isinstance(value, list):
        raise InputError(f"{place}: {what} is {shown(value)}, expected a list")
    return value


def ends(value: Any, length: int, place: Place) -> Ends:
    """How each of a row's responses ended, of a field ``ended``: "stop", "length" or null."""
    items = [value] if isinstance(value, str) and length == 1 else listed(value, place, "ended")
    if len(items) != length:
        raise InputError(f"{place}: ended has {len(items)} entries, expected {length}")
    for i, item in enumerate(items):
        if item is not None and item not in _ENDS:
            raise InputError(f"{place}: ended[{i}] is {shown(item)}, expected 'stop' or 'length'")
    return [None if item is None else _ENDS[item] for item in items]


def end_names(given: Sequence[bool | None]) -> list[str | None]:
    """What `ends` reads.

    >>> end_names([True, False, None])
    ['stop', 'length', None]
    """
    names: dict[bool | None, str | None] = {whole: name for name, whole in _ENDS.items()}
    return [names.get(whole) for whole in given]


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
