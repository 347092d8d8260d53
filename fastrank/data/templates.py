"""Chat templates: the tokenizer's own, one of a file, or one of the published prompt styles.

A template of one's own replaces the tokenizer's, and ``chat_template_kwargs`` are written to its
beginning as assignments, so that both are part of the tokenizer: a checkpoint saves them with it,
the cache of tokens tells them apart, and whatever loads the checkpoint renders as training did.
Handing the arguments to every call would leave all of this to every caller.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastrank.data.fields import Message
from fastrank.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
    path = Path(name).expanduser()
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
    """
    import jinja2

    given: Any = None if tools is None else list(tools)
    try:
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
    # Templates are programs of others, and jinja wraps only some of what they raise.
    except (jinja2.TemplateError, ValueError, TypeError, KeyError) as error:
        raise TemplateError(" ".join(str(error).split())) from error
