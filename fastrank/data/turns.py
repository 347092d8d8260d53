"""Candidates of several turns: which of them the assistant's are, in texts and in tokens.

Such a candidate goes on behind the prompt for more than one turn: an answer, the user's next
question and the answer to that, or calls of tools with their results. The assistant's turns are
ranked, each with its end of turn; the others are context, which the model reads and is not scored
on. A turn is found in the rendered conversation by rendering it once more with one private
character in the turn's place: what stands around that character has to stand around the turn too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from itertools import chain, takewhile
from typing import TYPE_CHECKING, Any, NamedTuple

from fastrank.data.fields import Message, Said, as_messages, as_turns, is_context, is_known_role
from fastrank.data.render import (
    CHANGED,
    HIDDEN_PROMPT,
    PARTED,
    PLAIN,
    TRIMMED,
    Refused,
    Rendered,
    Span,
    TemplateError,
    apply_template,
    check_plain,
    render_plain,
    shows,
    shows_prompt,
    unused_character,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fastrank.data.records import Record

UNKNOWN_ROLE = "several turns, one of them of an unknown role"
NEEDS_PLACES = "several turns, for a tokenizer that does not tell the places of its tokens"
SEVERAL = "candidates of several turns: the assistant's are ranked, the others are context"


def render_turns(record: Record, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """The texts of a record with candidates of several turns, its text prompt a user's message.

    Raises:
        Refused: the record cannot be rendered as it is.
        TemplateError: the chat template refuses it.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise Refused(NEEDS_PLACES)
    if not all(is_known_role(turn) for one in record.turns for turn in as_turns(one)):
        raise Refused(UNKNOWN_ROLE)
    prompt = as_messages(record.prompt)
    if tokenizer.chat_template is None:
        return _plain(prompt, record.turns, record.tools)
    return _chat(prompt, record.turns, record.tools, tokenizer)


# ---- in a text ---------------------------------------------------------------------------------


def find_text(text: str, content: str, before: str, after: str) -> Span | None:
    """A turn that is a text alone, between what a template writes before and after it; white space
    around it may be trimmed."""
    for said in (content, content.strip()):
        if text == before + said + after:
            return len(before), len(before) + len(said)
    return None


def find_message(
    text: str, turn: Message, before: str, after: str, opening: str, end: str
) -> Span | None:
    """A turn that says more than a text (calls, reasoning), between what a template writes before
    and after a text in its place. What such a turn begins with (``<think>``) may be written before
    a text as well: it belongs to the turn, from where ``opening``, the prompt for a turn, ends."""
    start = len(os.path.commonprefix([text, before]))
    stop = len(text) - len(after)
    if not text.endswith(after) or stop < start:
        return None
    opened = text.rfind(opening, 0, start)
    if opened >= 0:
        # Between the two no other turn ends.
        between = text[opened + len(opening) : start]
        if end not in between if end else not between.strip():
            start = opened + len(opening)
    return (start, stop) if shows(text[start:stop], turn) else None


def find_written(text: str, turn: Message, before: str, through: str) -> Span | None:
    """A turn between the conversation up to it and the conversation through it, if a template
    writes both as it writes the whole."""
    through = through.rstrip()
    if not (text.startswith(through) and through.startswith(before)):
        return None
    span = len(before), len(through)
    return span if shows(text[slice(*span)], turn) else None


class _Style(NamedTuple):
    """What a template writes around a turn of the assistant.

    Attributes:
        render: conversations as texts; with ``generate``, and the prompt for a new turn.
        mark: a character that no message says.
        opening: the prompt for a turn.
        space: white space between that and a text, a part of the text's first token.
        end: the end of a turn.
        parted: whether a turn is not written as it is opened.
    """

    render: Callable[..., list[str]]
    mark: str
    opening: str
    space: str
    end: str
    parted: bool

    @classmethod
    def of(cls, render: Callable[..., list[str]], asked: list[Message], mark: str) -> _Style:
        """Told from one turn behind the messages ``asked``."""
        closed, probe = render(asked, [*asked, *as_turns(mark)])
        if probe.count(mark) != 1:
            raise Refused(CHANGED)
        own = render(asked, generate=True)[0]
        head, tail = probe.split(mark)
        return cls(
            render=render,
            mark=mark,
            opening=own[len(closed) :] if own.startswith(closed) else "",
            space=head[len(own) :] if head.startswith(own) and not head[len(own) :].strip() else "",
            end=tail.rstrip(),
            parted=own.rstrip() != head.rstrip(),
        )

    def find(self, whole: Sequence[Message], at: int, text: str) -> Span | None:
        """Where turn ``at`` of a conversation stands in its text, end of turn included."""
        turn = whole[at]
        try:
            marked_turn = {"role": turn["role"], "content": self.mark}
            probe = self.render([*whole[:at], marked_turn, *whole[at + 1 :]])[0]
        except TemplateError:  # results of tools behind a text, for some
            before = self.render(whole[:at], generate=True)[0]
            return find_written(text, turn, before, self.render(whole[: at + 1])[0])
        if probe.count(self.mark) != 1:
            return None
        around = probe.split(self.mark)
        if turn.keys() > {"role", "content"}:
            span = find_message(text, turn, around[0], around[1], self.opening, self.end)
        else:
            span = find_text(text, turn["content"], *around)
        if span is None:
            return None
        start, stop = span
        if self.space and text.endswith(self.space, 0, start):
            start -= len(self.space)
        return start, stop + (len(self.end) if text.startswith(self.end, stop) else 0)


def _chat(
    prompt: list[Message],
    said: Sequence[Said],
    tools: Sequence[Any] | None,
    tokenizer: PreTrainedTokenizerBase,
) -> Rendered:
    def render(*talks: Sequence[Message], generate: bool = False) -> list[str]:
        return apply_template(tokenizer, talks, tools, generate=generate)

    talks = [as_turns(one) for one in said]
    mark = unused_character([*prompt, *chain.from_iterable(talks)])
    style = _Style.of(render, [*prompt, *takewhile(is_context, talks[0])], mark)
    notes = [SEVERAL, PARTED] if style.parted else [SEVERAL]
    joint, ranked = [], []
    for talk in talks:
        whole = [*prompt, *talk]
        (text,) = render(whole)
        spans: list[Span] = []
        for at, turn in enumerate(whole):
            if at < len(prompt) or is_context(turn):
                continue
            span = style.find(whole, at, text)
            if span is None or (spans and span[0] < spans[-1][1]):
                raise Refused(CHANGED)
            spans.append(span)
            if turn["content"] not in text[slice(*span)]:
                notes.append(TRIMMED)
        stop = spans[-1][1]
        if text[stop:].strip():
            raise Refused(CHANGED)
        joint.append(text[:stop])
        ranked.append(spans)
        if not shows_prompt(text, whole, tools):
            notes.append(HIDDEN_PROMPT)
    return _ranked(joint, ranked, style.end, True, notes)


def _plain(prompt: list[Message], said: Sequence[Said], tools: Sequence[Any] | None) -> Rendered:
    """As `render_plain` writes messages."""
    joint, ranked = [], []
    for talk in map(as_turns, said):
        own = [turn if is_context(turn) else turn | {"role": "assistant"} for turn in talk]
        whole = [*prompt, *own]
        check_plain(whole, tools)
        spans, text = [], ""
        for at in range(len(prompt), len(whole)):
            if not is_context(whole[at]):
                before = render_plain(whole[:at])
                text = f"{before} {whole[at]['content'].strip()}"
                spans.append((len(before), len(text)))
        joint.append(text)
        ranked.append(spans)
    return _ranked(joint, ranked, "", False, [SEVERAL, PLAIN])


def _ranked(
    joint: list[str], ranked: list[list[Span]], end: str, is_chat: bool, notes: Sequence[str]
) -> Rendered:
    """All that precedes the first ranked turn and is common to all belongs to the prompt."""
    first = min(spans[0][0] for spans in ranked)
    own = os.path.commonprefix(joint)[:first]
    return Rendered(own, joint, end, is_chat, tuple(dict.fromkeys(notes)), ranked=tuple(ranked))


# ---- in tokens ---------------------------------------------------------------------------------


def ranked_tokens(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[Span], start: int = 0
) -> list[bool] | None:
    """Which tokens of ``text[start:]`` have a character of a ranked turn.

    None if those of some turn do not say what it says: a tokenizer that lies about the places of
    its tokens, or changes what it reads.
    """
    encoded: Any = tokenizer(
        text[start:], add_special_tokens=False, verbose=False, return_offsets_mapping=True
    )
    ids, places = encoded["input_ids"], encoded["offset_mapping"]
    ranked = [False] * len(ids)
    for first, last in spans:
        begin, stop = first - start, min(last, len(text)) - start
        own = [i for i, (a, b) in enumerate(places) if a < stop and max(b, a + 1) > begin]
        said = tokenizer.decode([ids[i] for i in own], clean_up_tokenization_spaces=False)
        if text[first:last].strip() not in said:
            return None
        for i in own:
            ranked[i] = True
    return ranked


def bare_id(token: int) -> int:
    """The token of a `marked` id."""
    return token if token >= 0 else ~token


def marked(ids: Sequence[int], ranked: Sequence[bool]) -> list[int]:
    """Token ids in which one that is not ranked is written as its complement ``~id``.

    >>> marked([5, 6, 0], [True, False, False])
    [5, -7, -1]
    """
    return [token if own else ~token for token, own in zip(ids, ranked, strict=True)]
