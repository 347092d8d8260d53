"""A record as texts: the prompt, and the prompt with each response and its end of turn.

What is trained is what was given: every joint text is the prompt, the response's own text (less,
at most, surrounding white space that the template trims) and the end of the turn. A chat template
is a means to that. It is asked three things: the prompt for a new turn, every response as a turn,
and one private character as a turn, which shows what the template itself writes before and after
a response. What it writes before belongs to the prompt, except for a space. A response that the
template would change (those of reasoning models keep only what follows ``</think>``) is put behind
the prompt for a new turn by hand, with all others of its record, so that they share one prompt.
Whatever cannot be found in its text is no response to rank: the record is refused.

A template of one's own replaces the tokenizer's, and ``chat_template_kwargs`` are written to its
beginning as assignments, so that both are part of the tokenizer: a checkpoint saves them with it,
the cache of tokens tells them apart, and whatever loads the checkpoint renders as training did.
Handing the arguments to every call would leave all of this to every caller.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from fastrank.data.fields import (
    REASONING,
    Message,
    Prompt,
    Said,
    as_messages,
    as_turns,
)
from fastrank.data.limits import bounded
from fastrank.errors import InputError
from fastrank.options.paths import local_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fastrank.data.records import Record

#: Reasons to refuse a record.
TEMPLATE_REFUSED = "refused by the chat template"
CHANGED = "response that the chat template leaves out or changes"
NEEDS_TEMPLATE = "tools or message fields that only a chat template can show"

#: What is said of a record that is used.
BY_HAND = "response put behind the generation prompt by hand: the chat template would change it"
TRIMMED = "white space around a response trimmed"
PARTED = "generation prompt is not what the chat template writes before a response"
HIDDEN_PROMPT = "prompt text or tools that the chat template leaves out or changes"
PLAIN = "messages written as 'User: … Assistant:', for want of a chat template"
GLUED = "prompt and response run together without white space"

#: Fields of a message that carry text of their own; a plain rendering would lose them.
_STRUCTURED = ("tool_calls", *REASONING)


#: Where something stands in a text: from its first character to behind its last.
Span = tuple[int, int]


class Refused(Exception):
    """A record that cannot be rendered; its text is the reason."""


class Rendered(NamedTuple):
    """A record as the texts to tokenise.

    Attributes:
        own: the prompt alone; every joint text begins with it.
        joint: the prompt with each response.
        end: the template's own end of turn, with which joint texts end; "" for none.
        is_chat: whether a template wrote them, its BOS included.
        notes: what is to be said of the record.
        cut: positions of responses that have no end of turn.
        ranked: of candidates of several turns, where in each joint text the assistant's stand.
    """

    own: str
    joint: list[str]
    end: str
    is_chat: bool
    notes: tuple[str, ...] = ()
    cut: tuple[int, ...] = ()
    ranked: tuple[list[Span], ...] = ()


def render_plain(messages: Sequence[Message]) -> str:
    """Chat messages as plain text, for tokenizers without a chat template.

    Each message is its capitalised role, a colon and its content; messages are separated by an
    empty line, and the text ends with ``Assistant:``, which a response follows after one space.

    >>> render_plain([{"role": "user", "content": "Hi"}])
    'User: Hi\\n\\nAssistant:'
    """
    turns = [f"{m['role'].capitalize()}: {m['content'].strip()}" for m in messages]
    return "\n\n".join([*turns, "Assistant:"])


def render_record(record: Record, tokenizer: PreTrainedTokenizerBase, as_chat: bool) -> Rendered:
    """The texts of a record with candidates of one turn.

    Raises:
        Refused: the record cannot be rendered as it is.
        TemplateError: the chat template refuses it.
    """
    prompt = as_messages(record.prompt) if as_chat else record.prompt
    said = list(record.turns or record.responses)
    if isinstance(prompt, str) or tokenizer.chat_template is None:
        return _plain(prompt, record.responses, said, record.tools)
    return _chat(prompt, said, record.tools, tokenizer)


def with_ends(rendered: Rendered, ended: Sequence[bool]) -> Rendered:
    """The texts, without the end of those that did not come to it."""
    if not ended:
        return rendered
    cut = tuple(i for i, whole in enumerate(ended) if not whole)
    joint = [
        text.removesuffix(rendered.end) if i in cut else text
        for i, text in enumerate(rendered.joint)
    ]
    return rendered._replace(joint=joint, cut=cut)


def render_prompt(
    prompt: Prompt, tokenizer: PreTrainedTokenizerBase, tools: Sequence[Any] | None = None
) -> tuple[str, bool]:
    """A prompt alone as text, and whether a template wrote it.

    Raises:
        InputError: it cannot be rendered as it is.
    """
    if isinstance(prompt, list) and tokenizer.chat_template is not None:
        try:
            return apply_template(tokenizer, [prompt], tools, generate=True)[0], True
        except TemplateError as error:
            raise InputError(f"{TEMPLATE_REFUSED}: {error}") from error
    try:
        return _plain(prompt, [], [], tools).own, False
    except Refused as error:
        raise InputError(str(error)) from error


def _plain(
    prompt: Prompt, responses: Sequence[str], said: Sequence[Said], tools: Sequence[Any] | None
) -> Rendered:
    turns = [turn for turn in said if isinstance(turn, dict)]
    check_plain([*turns, *(prompt if isinstance(prompt, list) else [])], tools)
    if isinstance(prompt, str):
        glued = any(_is_glued(prompt, response) for response in responses)
        joint = [prompt + response for response in responses]
        return Rendered(prompt, joint, "", False, (GLUED,) if glued else ())
    own = render_plain(prompt)
    joint = [f"{own} {response.strip()}" for response in responses]
    trimmed = any(response != response.strip() for response in responses)
    return Rendered(own, joint, "", False, (PLAIN, TRIMMED) if trimmed else (PLAIN,))


def check_plain(turns: Sequence[Message], tools: Sequence[Any] | None) -> None:
    """Refuse what a plain rendering would lose."""
    if tools or any(turn.get(name) for turn in turns for name in _STRUCTURED):
        raise Refused(NEEDS_TEMPLATE)


def _is_glued(prompt: str, response: str) -> bool:
    """Whether a word or sentence of Latin letters runs into the next one."""
    last, first = prompt[-1:], response[:1]
    return (
        last != ""
        and last.isascii()
        and first.isascii()
        and first.isalnum()
        and (last.isalnum() or last in ".?!,;")
    )


def _chat(
    prompt: list[Message],
    said: Sequence[Said],
    tools: Sequence[Any] | None,
    tokenizer: PreTrainedTokenizerBase,
) -> Rendered:
    turns = [as_turns(one)[0] for one in said]
    mark = unused_character([*prompt, *turns])
    own = apply_template(tokenizer, [prompt], tools, generate=True)[0]
    *written, probe = apply_template(
        tokenizer, [[*prompt, turn] for turn in (*turns, *as_turns(mark))], tools, generate=False
    )
    if probe.count(mark) != 1:
        raise Refused(CHANGED)
    head, tail = probe.split(mark)
    end = tail.rstrip()  # white space after the end of turn is never generated
    notes = []
    joint: list[str | None] = []
    for one, text in zip(said, written, strict=True):
        if not isinstance(one, str):
            joint.append(text.rstrip() if end else text)
            continue
        kept = next((s for s in (one, one.strip()) if text == head + s + tail), None)
        if kept is not None and kept != one:
            notes.append(TRIMMED)
        joint.append(None if kept is None else head + kept + end)
    own_text = head
    if any(isinstance(one, dict) for one in said):
        whole = [text for text in joint if text is not None]
        if len(whole) < len(joint):
            raise Refused(CHANGED)
        own_text = _common_prompt(own, head, whole)
        for text, turn in zip(whole, turns, strict=True):
            if not shows(text[len(own_text) :], turn):
                raise Refused(CHANGED)
    elif None in joint:
        notes = [BY_HAND]
        own_text = _opened(own, head, [turn["content"] for turn in turns])
        whole = [own_text + turn["content"] + end for turn in turns]
    else:
        whole = [text for text in joint if text is not None]
        if own.rstrip() != head.rstrip():
            notes.append(PARTED)
        elif head.startswith(own):  # a space before a response is part of its first token
            own_text = own
    if not shows_prompt(own, prompt, tools):
        notes.append(HIDDEN_PROMPT)
    return Rendered(own_text, whole, end, True, tuple(dict.fromkeys(notes)))


def unused_character(messages: Sequence[Message]) -> str:
    """A character of Unicode's private area that no message says."""
    text = "".join([message["content"] for message in messages])
    return next(mark for mark in map(chr, range(0xE000, 0xF900)) if mark not in text)


def _common_prompt(own: str, head: str, joint: Sequence[str]) -> str:
    """The longest of the texts that a template writes before a turn with which all turns begin."""
    for start in (head, own):
        if all(text.startswith(start) for text in joint):
            return start
    return os.path.commonprefix([own, *joint])


def _opened(own: str, head: str, responses: Sequence[str]) -> str:
    """The generation prompt, less what it opens (``<think>``) where a response opens it itself."""
    lead = os.path.commonprefix([own, head])
    opened = own[len(lead) :].strip()
    if opened and any(response.lstrip().startswith(opened) for response in responses):
        return lead
    return own


def shows(text: str, turn: Message) -> bool:
    """Whether a rendered turn has everything that the message says."""
    return all(part in text for part in _parts(turn)) or all(
        part in text or json.dumps(part, ensure_ascii=False)[1:-1] in text for part in _parts(turn)
    )


def _parts(turn: Message) -> Iterator[str]:
    """The texts of a message: its content, its reasoning, names and arguments of its calls."""
    yield turn["content"].strip()
    reasoning = next((turn[name] for name in REASONING if turn.get(name)), "")
    if isinstance(reasoning, str):
        yield reasoning.strip()
    for call in turn.get("tool_calls") or []:
        called = call.get("function", call) if isinstance(call, dict) else call
        if isinstance(called, dict):
            yield from _leaves([called.get("name"), called.get("arguments")])


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _leaves([*value, *value.values()])
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)


def shows_prompt(own: str, prompt: Sequence[Message], tools: Sequence[Any] | None) -> bool:
    """Whether a rendered prompt has what its messages say and the names of the tools.

    Earlier turns of the assistant are left out: templates shorten their reasoning by design.
    """
    said = [turn["content"].strip() for turn in prompt if turn["role"] != "assistant"]
    functions = [tool.get("function", tool) for tool in tools or []]
    names = [str(function.get("name", "")) for function in functions if isinstance(function, dict)]
    return all(text in own for text in (*said, *names))


# ---- templates --------------------------------------------------------------------------------

#: Styles in which published models and data sets write a conversation.
STYLES = {
    # Stanford Alpaca, used by RRHF.
    "alpaca": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}"
        "{{ '\\n\\n' if not loop.last else '' }}"
        "{% elif m.role == 'system' %}{{ m.content }}{{ '\\n\\n' }}"
        "{% else %}{% if loop.first %}"
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.{{ '\\n\\n' }}{% endif %}"
        "### Instruction:{{ '\\n' + m.content + '\\n\\n' }}### Response:{% endif %}{% endfor %}"
    ),
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m.role + '\\n' + m.content }}<|im_end|>{{ '\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{{ '\\n' }}{% endif %}"
    ),
    # Anthropic's HH, used by PRO.
    "hh": (
        "{% for m in messages %}{{ '\\n\\n' }}"
        "{% if m.role == 'assistant' %}Assistant: {% elif m.role == 'user' %}Human: "
        "{% else %}{{ m.role | capitalize }}: {% endif %}{{ m.content | trim }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\\n\\n' }}Assistant:{% endif %}"
    ),
    # OpenAssistant.
    "oasst": (
        "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>"
        "{% elif m.role == 'user' %}<|prompter|>{% else %}<|{{ m.role }}|>{% endif %}"
        "{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    ),
}

#: The day that a template is told it is. The day of the run would give every run other tokens.
TODAY = datetime(2026, 1, 1)


#: Stands in for the function of this name that transformers gives to templates.
_CLOCK = (
    "{% macro strftime_now(form) %}{{ form"
    + "".join(
        f"|replace('%{sign}', {TODAY.strftime('%' + sign)!r})"
        for sign in [*"YmdbBeyjaAHIMSpUWuFTDcxX", "-d", "-m", "-H", "-I", "-M", "-S"]
    )
    + " }}{% endmacro %}{{ '' }}"
)


class TemplateError(Exception):
    """A conversation that the chat template refuses."""


def set_chat_template(
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None = None,
    chat_template_kwargs: str | dict[str, Any] | None = None,
) -> PreTrainedTokenizerBase:
    """Give a tokenizer a chat template, and values to the template's variables; returns it.

    Args:
        tokenizer: changed in place.
        chat_template: one of `STYLES`, or a file with a Jinja template; None leaves the
            tokenizer's own.
        chat_template_kwargs: names and values, or a JSON object of them, for example
            ``'{"enable_thinking": false}'``.

    Raises:
        InputError: no such style or file, no template to give values to, or no JSON object.
    """
    if chat_template is not None:
        tokenizer.chat_template = _template(chat_template)
    if chat_template_kwargs is None:
        return tokenizer
    values = _object(chat_template_kwargs)
    own: Any = tokenizer.chat_template
    if own is None:
        raise InputError(
            "chat_template_kwargs: the tokenizer has no chat template to take them; "
            "give one by chat_template"
        )
    lines = "".join(f"{{% set {name} = {_literal(value)} %}}" for name, value in values.items())
    # The empty output keeps the template's first line break from being taken for the block's.
    start = lines + "{{ '' }}"
    if isinstance(own, dict):
        tokenizer.chat_template = {name: start + text for name, text in own.items()}
    else:
        tokenizer.chat_template = start + own
    return tokenizer


def _template(name: str) -> str:
    if name in STYLES:
        return STYLES[name]
    path = local_path(name)
    if not path.is_file():
        known = ", ".join(STYLES)
        raise InputError(f"chat_template must be a file or one of {known}, got '{name}'")
    import jinja2

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise InputError(f"chat_template {name}: cannot be read as UTF-8 text") from error
    try:
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(
            text.replace("{% generation %}", "").replace("{% endgeneration %}", "")
        )
    except jinja2.TemplateSyntaxError as error:
        raise InputError(f"chat_template {name}, line {error.lineno}: {error.message}") from error
    return text


def _object(given: str | dict[str, Any]) -> dict[str, Any]:
    try:
        values = json.loads(given) if isinstance(given, str) else given
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise InputError(f"chat_template_kwargs must be a JSON object, got '{given}'")
    for name in values:
        if not str(name).isidentifier():
            raise InputError(f"chat_template_kwargs: '{name}' is no name of a variable")
    return values


def _literal(value: Any) -> str:
    """A JSON value as Jinja writes it."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        return "{" + ", ".join(f"{ascii(k)}: {_literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return ascii(value)


def _dated(template: str) -> str:
    """The template with `TODAY` where it would print the day of the run."""
    return _CLOCK + template if "strftime_now" in template else template


def apply_template(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    tools: Sequence[Any] | None,
    *,
    generate: bool,
) -> list[str]:
    """Each conversation as text, with the prompt for a new assistant turn if ``generate``.

    Raises:
        TemplateError: the template refuses one of them.
        InputError: it takes too much time or memory.
    """
    import jinja2

    given: Any = None if tools is None else list(tools)
    try:
        with bounded("the chat template, for one record,"):
            return [
                str(text)
                for text in tokenizer.apply_chat_template(
                    [list(turns) for turns in conversations],
                    tools=given,
                    tokenize=False,
                    add_generation_prompt=generate,
                    chat_template=_dated(tokenizer.get_chat_template(tools=given)),
                )
            ]
    except InputError:
        raise
    # Templates are programs of others, and jinja wraps only some of what they raise.
    except (
        *(jinja2.TemplateError, ValueError, TypeError, LookupError),
        *(ArithmeticError, AttributeError, RecursionError),
    ) as error:
        raise TemplateError(" ".join(str(error).split())) from error
