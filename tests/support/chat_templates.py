"""Small chat templates with the habits of published ones, and messages for them."""

from __future__ import annotations

from typing import Any

from fastrank.data.records import Record
from fastrank.data.render import CHANGED
from fastrank.data.report import Report
from fastrank.data.tokenize import Encoded, encode_record

START = "{% for m in messages %}<|{{ m.role }}|>"
OPEN = "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"


def turns(content: str, opened: str = "") -> str:
    """A template that writes the content of each message so."""
    return START + content + "<|end|>" + OPEN.replace("{% endif %}", opened + "{% endif %}")


CHAT = turns("{{ m.content }}")
TRIM = turns("{{ m.content | trim }}")
UPPER = turns("{{ m.content | upper }}")
CUT = turns("{{ m.content[:3] }}")
DROP = START + "{% if m.role == 'user' %}{{ m.content }}{% endif %}<|end|>" + OPEN
TWICE = turns("{{ m.content }}{{ m.content if m.role == 'assistant' else '' }}")
SILENT = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}" + OPEN
#: DeepSeek-R1: what precedes </think> is left out, and a new turn begins inside <think>.
STRIP = "{{ m.content.split('</think>')[-1] if m.role == 'assistant' else m.content }}"
R1 = turns(STRIP, "<think>\n")
R1_BEFORE = turns(STRIP)
#: Qwen3: reasoning in a field or before </think> is written anew, an empty one for none.
QWEN = (
    START + "{% if m.role == 'assistant' %}{% set ns = namespace(r='', c=m.content) %}"
    "{% if m.reasoning_content is string %}{% set ns.r = m.reasoning_content %}"
    "{% elif '</think>' in m.content %}{% set ns.c = m.content.split('</think>')[-1].lstrip() %}"
    "{% set ns.r = m.content.split('</think>')[0].split('<think>')[-1] %}{% endif %}"
    "<think>\n{{ ns.r | trim }}\n</think>\n\n{{ ns.c }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}"
    "{% else %}{{ m.content }}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
CALLS = (
    "{% if tools %}[{% for t in tools %}{{ t.function.name }}{% endfor %}]{% endif %}"
    + START
    + "{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>"
    "{% endfor %}<|end|>" + OPEN
)
DATED = "{{ strftime_now('%d %b %Y') }}" + CHAT
COLON = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}" + (
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
#: Qwen3's: only the last turn has a place for thoughts.
HISTORY = CALLS.replace(
    "{{ m.content }}",
    "{{ '<think>\n\n</think>\n\n' if m.role == 'assistant' and loop.last }}{{ m.content }}",
)
#: Mistral's: users and texts of the assistant by turns, and results of tools behind calls alone.
MISTRAL = (
    "{% set ns = namespace(n=0) %}{% for m in messages %}"
    "{% if m.role == 'user' or (m.role == 'assistant' and not m.tool_calls) %}"
    "{% if (m.role == 'user') != (ns.n % 2 == 0) %}{{ raise_exception('by turns') }}{% endif %}"
    "{% set ns.n = ns.n + 1 %}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% elif m.role == 'tool' %}[RESULT] {{ m.content }}[/RESULT]"
    "{% elif m.tool_calls %}[CALLS] {{ m.tool_calls | tojson }}{{ eos_token }}"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
#: A new turn that is opened otherwise than turns are written.
OTHER = turns("\n{{ m.content }}", "!\n")

HI = [{"role": "user", "content": "hi"}]
ASK = "<|user|>hi<|end|><|assistant|>"
TOOL = {"type": "function", "function": {"name": "clock", "parameters": {}}}


def call(arguments: Any, name: str = "clock") -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "content": None, "tool_calls": [{"function": function}]}


def answer(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


#: What random templates write of a message, and before and behind it.
CONTENTS = [
    "{{ m.content }}",
    "{{ m.content | trim }}",
    "{{ m.content | upper }}",
    "{{ m.content[:4] }}",
    "{{ m.content[1:] }}",
    "{{ m.content | replace('a', '') }}",
    "{{ m.content | reverse }}",
    "{{ m.content.split('</think>')[-1] }}",
    "{{ m.content.split('</think>')[-1] | trim }}",
    "{{ m.content if m.role == 'user' else '' }}",
    "{{ strftime_now('%H:%M') }}{{ m.content }}",
    "{{ m.role }} said {{ m.content | length }} {{ m.content }}",
]
LEADS = ["", " ", "\n", "<think>\n\n</think>\n\n", "a", "assistant"]
ENDS = ["<|end|>", "", "\n", "a", "<|end|>\n"]


def assembled(content: str, lead: str, opened: str, end: str) -> str:
    """A template that writes so, and opens a new turn with ``opened``."""
    return (
        "{% for m in messages %}<|{{ m.role }}|>"
        f"{{{{ {lead!r} if m.role == 'assistant' else '' }}}}{content}{{{{ {end!r} }}}}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>"
        f"{{{{ {opened!r} }}}}{{% endif %}}"
    )


def encoded_or_counted(record: Record, tokenizer: Any) -> tuple[Encoded | None, Report]:
    """A record's tokens and the report on it; one that gives none must be counted with its line."""
    report = Report()
    report.add_read(len(record.responses))
    report.keep(record.scores)
    encoded = encode_record(record, tokenizer, report)
    if encoded is None:
        assert report.dropped == {CHANGED: [record.line]} and report.kept == 0
    return encoded, report
