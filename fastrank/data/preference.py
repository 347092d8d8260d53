"""Preference pairs: where the prompt ends and the two responses begin.

Published sets disagree: the prompt stands apart, or is repeated inside ``chosen`` and ``rejected``,
or is only there (implicit). Conversations are cut at their common leading messages. Texts with an
implicit prompt are cut after the last ``Assistant:`` of their common beginning, as Anthropic's HH
data needs; without that marker at the last white space, so that no word is split.
"""

from __future__ import annotations

import os
from typing import Any

from fastrank.data import fields
from fastrank.data.fields import Message, Prompt, Said
from fastrank.data.files import Place
from fastrank.errors import InputError

_MARKER = "Assistant:"


def split_pair(
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
