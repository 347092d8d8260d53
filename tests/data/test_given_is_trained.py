"""What a user gives is what is trained: exact tokens, or a count with the reason, or an error.

The table holds one row of a file each, with the text of the prompt's and of every response's
tokens. The tokenizer's tokens are bytes and a few special ones, so that equal texts are equal
tokens, which is checked as well.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from char_tokenizer import make_tokenizer
from chat_templates import (
    ASK,
    CALLS,
    CHAT,
    COLON,
    CONTENTS,
    CUT,
    DATED,
    DROP,
    ENDS,
    HI,
    LEADS,
    OTHER,
    QWEN,
    R1,
    R1_BEFORE,
    SILENT,
    TOOL,
    TRIM,
    TWICE,
    UPPER,
    answer,
    assembled,
    call,
    encoded_or_counted,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastrank.data.load import load_groups
from fastrank.data.records import Record
from fastrank.data.render import (
    BY_HAND,
    CHANGED,
    GLUED,
    HIDDEN_PROMPT,
    NEEDS_TEMPLATE,
    PARTED,
    PLAIN,
    TEMPLATE_REFUSED,
    TRIMMED,
    set_chat_template,
)
from fastrank.data.report import CUT_SAMPLE, SAME_PAIRS
from fastrank.data.tokenize import TokenizeOptions, encode_prompt
from fastrank.errors import InputError


class Case(NamedTuple):
    """A row; the template; texts of prompt and responses, or the reason to drop, or the error."""

    prompt: Any
    responses: list[Any]
    template: str | None
    expected: tuple[str, list[str]] | str
    notes: tuple[str, ...] = ()
    more: dict[str, Any] = {}
    options: dict[str, Any] = {}
    kwargs: dict[str, Any] | None = None
    counts: dict[str, int] = {}


CASES = {
    "plain text": Case("ab ", ["c", "d"], None, ("<s>ab ", ["c</s>", "d</s>"])),
    "glued": Case(
        "a cat?", ["A cat", " B"], None, ("<s>a cat?", ["A cat</s>", " B</s>"]), (GLUED,)
    ),
    "not glued": Case("q:\n", ["A", "B"], None, ("<s>q:\n", ["A</s>", "B</s>"])),
    "not Latin": Case("猫", ["犬", "鳥"], None, ("<s>猫", ["犬</s>", "鳥</s>"])),
    "no template": Case(
        HI, ["c", "d"], None, ("<s>User: hi\n\nAssistant:", [" c</s>", " d</s>"]), (PLAIN,)
    ),
    "no template, trimmed": Case(
        HI,
        ["c ", "d"],
        None,
        ("<s>User: hi\n\nAssistant:", [" c</s>", " d</s>"]),
        (PLAIN, TRIMMED),
    ),
    "no template for tools": Case(HI, ["c", "d"], None, NEEDS_TEMPLATE, more={"tools": [TOOL]}),
    "text with tools": Case("hi", ["c", "d"], CALLS, NEEDS_TEMPLATE, more={"tools": [TOOL]}),
    "no template for calls": Case(HI, [call({}), "d"], None, NEEDS_TEMPLATE),
    "no template for reasoning": Case(
        HI, [answer("c", reasoning_content="r"), "d"], None, NEEDS_TEMPLATE
    ),
    "chat": Case(HI, ["c", "d\n"], CHAT, (ASK, ["c<|end|>", "d\n<|end|>"])),
    "the same text twice in a turn": Case(
        HI, ["end", "user"], CHAT, (ASK, ["end<|end|>", "user<|end|>"])
    ),
    "text as chat": Case(
        "hi", ["c", "d"], CHAT, (ASK, ["c<|end|>", "d<|end|>"]), options={"as_chat": True}
    ),
    "text for a chat model": Case("hi ", ["c", "d"], CHAT, ("<s>hi ", ["c</s>", "d</s>"])),
    "trim": Case(HI, [" c", "d\n"], TRIM, (ASK, ["c<|end|>", "d<|end|>"]), (TRIMMED,)),
    "trim to the same": Case(
        HI, ["c", "c "], TRIM, (ASK, ["c<|end|>", "c<|end|>"]), (TRIMMED,), counts={SAME_PAIRS: 1}
    ),
    "inner space stays": Case(HI, ["c  c", "d"], TRIM, (ASK, ["c  c<|end|>", "d<|end|>"])),
    "upper case": Case(
        HI,
        ["cd", "e"],
        UPPER,
        ("<|user|>HI<|end|><|assistant|>", ["cd<|end|>", "e<|end|>"]),
        (BY_HAND, HIDDEN_PROMPT),
    ),
    "upper case of what is": Case(
        [{"role": "user", "content": "HI"}],
        ["CD", "4"],
        UPPER,
        ("<|user|>HI<|end|><|assistant|>", ["CD<|end|>", "4<|end|>"]),
    ),
    "cut": Case(HI, ["long one", "two"], CUT, (ASK, ["long one<|end|>", "two<|end|>"]), (BY_HAND,)),
    "short enough": Case(HI, ["one", "two"], CUT, (ASK, ["one<|end|>", "two<|end|>"])),
    "dropped": Case(HI, ["c", "d"], DROP, CHANGED),
    "twice": Case(HI, ["c", "d"], TWICE, CHANGED),
    "silent about the assistant": Case(HI, ["c", "d"], SILENT, CHANGED),
    "R1 thinking": Case(
        HI,
        ["<think>good</think>4", "<think>bananas</think>4"],
        R1_BEFORE,
        (ASK, ["<think>good</think>4<|end|>", "<think>bananas</think>4<|end|>"]),
        (BY_HAND,),
    ),
    "R1 opens thinking": Case(
        HI,
        ["<think>good</think>4", "<think>bananas</think>4"],
        R1,
        (ASK, ["<think>good</think>4<|end|>", "<think>bananas</think>4<|end|>"]),
        (BY_HAND,),
    ),
    "R1 goes on thinking": Case(
        HI,
        ["good</think>4", "bananas</think>4"],
        R1,
        (ASK + "<think>\n", ["good</think>4<|end|>", "bananas</think>4<|end|>"]),
        (BY_HAND,),
    ),
    "R1 without a thought": Case(HI, ["4", "5"], R1, (ASK, ["4<|end|>", "5<|end|>"]), (PARTED,)),
    "Qwen3 without a thought": Case(
        HI,
        ["4", "5"],
        QWEN,
        (ASK + "<think>\n\n</think>\n\n", ["4<|end|>", "5<|end|>"]),
        (PARTED,),
    ),
    "Qwen3 told not to think": Case(
        HI,
        ["4", "5"],
        QWEN,
        (ASK + "<think>\n\n</think>\n\n", ["4<|end|>", "5<|end|>"]),
        kwargs={"enable_thinking": False},
    ),
    "Qwen3 thinking": Case(
        HI,
        ["<think>a</think>4", "5"],
        QWEN,
        (ASK, ["<think>a</think>4<|end|>", "5<|end|>"]),
        (BY_HAND,),
    ),
    "Qwen3 reasoning": Case(
        HI,
        [answer("4", reasoning_content="good"), answer("4", reasoning_content="bad")],
        QWEN,
        (ASK, ["<think>\ngood\n</think>\n\n4<|end|>", "<think>\nbad\n</think>\n\n4<|end|>"]),
    ),
    "Qwen3 reasoning and a call": Case(
        HI,
        [answer("", reasoning_content="r", tool_calls=call({"x": "y"})["tool_calls"]), "n"],
        QWEN,
        (
            ASK,
            [
                '<think>\nr\n</think>\n\n<call>{"name": "clock", "arguments": {"x": "y"}}</call>'
                "<|end|>",
                "<think>\n\n</think>\n\nn<|end|>",
            ],
        ),
    ),
    "reasoning that is not shown": Case(
        HI, [answer("4", reasoning_content="good"), answer("5")], CHAT, CHANGED
    ),
    "thinking that is not shown": Case(HI, [answer("4", thinking="good"), "5"], CHAT, CHANGED),
    "a call": Case(
        HI,
        [call({"city": "Köln"}), "d"],
        CALLS,
        (
            ASK,
            ['<call>{"name": "clock", "arguments": {"city": "Köln"}}</call><|end|>', "d<|end|>"],
        ),
    ),
    "a call, arguments as text": Case(
        HI,
        [call('{"city": "Bonn"}'), call("{}")],
        CALLS,
        (
            ASK,
            [
                '<call>{"name": "clock", "arguments": {"city": "Bonn"}}</call><|end|>',
                '<call>{"name": "clock", "arguments": {}}</call><|end|>',
            ],
        ),
    ),
    "a call that is not shown": Case(HI, [call({}), "d"], CHAT, CHANGED),
    "a call with a line break": Case(
        HI,
        [call({"x": 'a\n"b"'}), "d"],
        CALLS,
        (
            ASK,
            [
                '<call>{"name": "clock", "arguments": {"x": "a\\n\\"b\\""}}</call><|end|>',
                "d<|end|>",
            ],
        ),
    ),
    "tools": Case(
        HI, ["c", "d"], CALLS, ("[clock]" + ASK, ["c<|end|>", "d<|end|>"]), more={"tools": [TOOL]}
    ),
    "tools as JSON": Case(
        HI,
        ["c", "d"],
        CALLS,
        ("[clock]" + ASK, ["c<|end|>", "d<|end|>"]),
        more={"tools": json.dumps([TOOL])},
    ),
    "no tools": Case(HI, ["c", "d"], CALLS, (ASK, ["c<|end|>", "d<|end|>"]), more={"tools": []}),
    "tools that are not shown": Case(
        HI, ["c", "d"], CHAT, (ASK, ["c<|end|>", "d<|end|>"]), (HIDDEN_PROMPT,), {"tools": [TOOL]}
    ),
    "a call in the prompt": Case(
        [*HI, call({}), {"role": "tool", "content": "noon"}],
        ["c", "d"],
        CALLS,
        (
            '<|user|>hi<|end|><|assistant|><call>{"name": "clock", "arguments": {}}</call><|end|>'
            "<|tool|>noon<|end|><|assistant|>",
            ["c<|end|>", "d<|end|>"],
        ),
    ),
    "nulls of a table": Case(
        [{**HI[0], "tool_calls": None, "name": None}],
        [answer("c", tool_calls=None), answer("d", reasoning_content=None)],
        CALLS,
        (ASK, ["c<|end|>", "d<|end|>"]),
    ),
    "parts of text": Case(
        [
            {
                "role": "user",
                "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}],
            }
        ],
        ["c", "d"],
        CHAT,
        (ASK, ["c<|end|>", "d<|end|>"]),
    ),
    "a hidden system message": Case(
        [{"role": "system", "content": "be kind"}, *HI],
        ["c", "d"],
        CHAT.replace("{{ m.content }}", "{{ '' if m.role == 'system' else m.content }}"),
        ("<|system|><|end|>" + ASK, ["c<|end|>", "d<|end|>"]),
        (HIDDEN_PROMPT,),
    ),
    "date": Case(HI, ["c", "d"], DATED, ("01 Jan 2026" + ASK, ["c<|end|>", "d<|end|>"])),
    "no end of turn": Case(HI, ["c", "d"], COLON, ("user: hi\nassistant:", [" c</s>", " d</s>"])),
    "a turn opened otherwise": Case(
        HI,
        ["c", "d"],
        OTHER,
        ("<|user|>\nhi<|end|><|assistant|>\n", ["c<|end|>", "d<|end|>"]),
        (PARTED,),
    ),
    "cut sample": Case(
        "ab ",
        ["c", "d", "e"],
        None,
        ("<s>ab ", ["c", "d</s>", "e</s>"]),
        more={"ended": ["length", "stop", None]},
        counts={CUT_SAMPLE: 1},
    ),
    "cut sample of a chat": Case(
        HI,
        ["c", "d"],
        CHAT,
        (ASK, ["c", "d<|end|>"]),
        more={"ended": ["length", "stop"]},
        counts={CUT_SAMPLE: 1},
    ),
    "cut sample of a template without an end": Case(
        HI,
        ["c", "d"],
        COLON,
        ("user: hi\nassistant:", [" c", " d</s>"]),
        more={"ended": ["length", None]},
        counts={CUT_SAMPLE: 1},
    ),
    "cut thinking": Case(
        HI,
        ["<think>go", "<think>a</think>4"],
        R1_BEFORE,
        (ASK, ["<think>go", "<think>a</think>4<|end|>"]),
        (BY_HAND,),
        more={"ended": ["length", "stop"]},
        counts={CUT_SAMPLE: 1},
    ),
    "cut sample beside a call": Case(
        HI,
        [call({}), "d"],
        CALLS,
        (ASK, ['<call>{"name": "clock", "arguments": {}}</call><|end|>', "d"]),
        more={"ended": ["stop", "length"]},
        counts={CUT_SAMPLE: 1},
    ),
    "cut sample without a template": Case(
        HI,
        ["c", "d"],
        None,
        ("<s>User: hi\n\nAssistant:", [" c", " d</s>"]),
        (PLAIN,),
        more={"ended": ["length", "stop"]},
        counts={CUT_SAMPLE: 1},
    ),
    "cut sample of no prompt": Case(
        "",
        ["c", "d"],
        None,
        ("<s>", ["c", "d</s>"]),
        more={"ended": ["length", "stop"]},
        counts={CUT_SAMPLE: 1},
    ),
    "a wrong end": Case(
        HI,
        ["c", "d"],
        CHAT,
        "error: ended[1] is 'eos' (str), expected 'stop' or 'length'",
        more={"ended": ["stop", "eos"]},
    ),
    "too few ends": Case(
        HI, ["c", "d"], CHAT, "error: ended has 1 entries, expected 2", more={"ended": ["stop"]}
    ),
    "refused": Case(HI, ["c", "d"], "{{ raise_exception('no') }}", TEMPLATE_REFUSED),
    "a template that adds text to nothing": Case(
        HI, ["c", "d"], "{{ 1 + messages }}", TEMPLATE_REFUSED
    ),
    "blank beside a call": Case(HI, [answer(" "), "c", "d"], CHAT, (ASK, ["c<|end|>", "d<|end|>"])),
    "alpaca": Case(
        HI,
        ["c", "d"],
        "alpaca",
        (
            "Below is an instruction that describes a task. Write a response that appropriately "
            "completes the request.\n\n### Instruction:\nhi\n\n### Response:",
            ["c</s>", "d</s>"],
        ),
    ),
    "hh": Case(
        HI, [" c", "d"], "hh", ("\n\nHuman: hi\n\nAssistant:", [" c</s>", " d</s>"]), (TRIMMED,)
    ),
    "oasst": Case(HI, ["c", "d"], "oasst", ("<|prompter|>hi</s><|assistant|>", ["c</s>", "d</s>"])),
    "chatml": Case(
        HI,
        ["c", "d"],
        "chatml",
        (
            "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
            ["c<|im_end|>", "d<|im_end|>"],
        ),
    ),
    "content null": Case(
        [{"role": "user", "content": None}], ["c", "d"], CHAT, "error: prompt[0].content is None"
    ),
    "no content": Case([{"role": "user"}], ["c", "d"], CHAT, "error: expected a message"),
    "no content in a response": Case(
        HI, [{"role": "assistant", "content": None}, "d"], CHAT, "error: responses[0][0].content is"
    ),
    "tools that are none": Case(
        HI, ["c", "d"], CALLS, "error: tools is 'clock'", more={"tools": "clock"}
    ),
    "tools that are names": Case(
        HI, ["c", "d"], CALLS, "error: tools[0] is 'clock'", more={"tools": ["clock"]}
    ),
    "calls that are none": Case(
        HI, [{"role": "assistant", "tool_calls": "f"}, "d"], CALLS, "error: tool_calls is 'f'"
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_table(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    tokenizer = make_tokenizer()
    if case.template in ("alpaca", "chatml", "hh", "oasst"):
        set_chat_template(tokenizer, case.template)
    else:
        tokenizer.chat_template = case.template
    if case.kwargs is not None:
        set_chat_template(tokenizer, None, case.kwargs)
    scores = [float(-i) for i in range(len(case.responses))]
    row = {"prompt": case.prompt, "responses": case.responses, "scores": scores, **case.more}
    path = tmp_path / "data.jsonl"
    # A second, harmless row, so that a file whose first record is dropped still leaves something.
    other = {"prompt": "x ", "responses": ["y", "z"], "scores": [1, 0]}
    path.write_text(f"{json.dumps(row)}\n{json.dumps(other)}\n", encoding="utf-8")
    options = TokenizeOptions(**case.options)
    if isinstance(case.expected, str) and case.expected.startswith("error: "):
        with pytest.raises(InputError) as error:
            load_groups(path, tokenizer, options=options)
        assert case.expected.removeprefix("error: ") in str(error.value)
        assert "line 1" in str(error.value) or ":1" in str(error.value)
        assert "\n" not in str(error.value)
        return
    groups, report = load_groups(path, tokenizer, options=options)
    if isinstance(case.expected, str):
        assert report.dropped == {case.expected: [1]} and len(groups) == 1
        return
    assert report.dropped == {}
    assert {what: len(lines) for what, lines in report.counts.items()} == case.counts
    assert {note: lines[0] for note, lines in report.notes.items() if 1 in lines} == dict.fromkeys(
        case.notes, 1
    )
    prompt, responses = case.expected
    said = tokenizer.decode(groups[0].prompt_ids), *map(tokenizer.decode, groups[0].response_ids)
    assert said == (prompt, *responses)
    for text, ids in zip(
        (prompt, *responses), (groups[0].prompt_ids, *groups[0].response_ids), strict=True
    ):
        assert ids.tolist() == tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize(
    "content", [CHAT, "\n" + CHAT, "{% macro f() %}{{ x }}{% endmacro %}{{ f() }}"]
)
def test_values_change_nothing_else_of_a_template(content: str) -> None:
    tokenizer = make_tokenizer(chat_template=content)
    before = tokenizer.apply_chat_template(HI, tokenize=False, x="é\n'\"😀")
    set_chat_template(tokenizer, None, {"x": "é\n'\"😀", "unused": [None, True, {"k": 1.5}]})
    assert tokenizer.apply_chat_template(HI, tokenize=False) == before


@pytest.mark.parametrize(
    ("template", "kwargs", "expected"),
    [
        ("absent.jinja", None, "must be a file or one of alpaca, chatml, hh, oasst"),
        (None, "[1]", "must be a JSON object"),
        (None, "{", "must be a JSON object"),
        (None, '{"a b": 1}', "'a b' is no name of a variable"),
        (None, '{"a": 1}', "no chat template to take them"),
    ],
)
def test_templates_that_cannot_be_used(
    template: str | None, kwargs: str | None, expected: str
) -> None:
    with pytest.raises(InputError, match=expected):
        set_chat_template(make_tokenizer(), template, kwargs)


def test_a_template_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_text(CHAT)
    assert set_chat_template(make_tokenizer(), str(path)).chat_template == CHAT
    path.write_text("{% for m in messages %}")
    with pytest.raises(InputError, match="own.jinja, line 1"):
        set_chat_template(make_tokenizer(), str(path))


def test_sampling_shows_the_tools_and_the_date_of_training() -> None:
    tokenizer = make_tokenizer(chat_template=CALLS + "{{ strftime_now('%Y') }}")
    ids = encode_prompt(HI, tokenizer, tools=[TOOL])
    assert tokenizer.decode(ids) == "[clock]" + ASK + "2026"
    with pytest.raises(InputError, match=NEEDS_TEMPLATE):
        encode_prompt("hi", tokenizer, tools=[TOOL])


# ---- random templates -------------------------------------------------------------------------

said = st.text("ab4 \n<>", max_size=8) | st.sampled_from(
    ["<think>a</think>4", "<think>b</think>4", "a</think>4", "<|end|>", "user", "12:00"]
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    content=st.sampled_from(CONTENTS),
    lead=st.sampled_from(LEADS),
    opened=st.sampled_from(LEADS),
    end=st.sampled_from(ENDS),
    responses=st.lists(said.filter(str.strip), min_size=2, max_size=4),
    ask=said,
)
def test_any_template_shows_every_response_or_the_record_is_counted(
    content: str, lead: str, opened: str, end: str, responses: list[str], ask: str
) -> None:
    tokenizer = make_tokenizer(chat_template=assembled(content, lead, opened, end))
    record = Record([{"role": "user", "content": ask}], responses, [0.0] * len(responses), 3)
    encoded, report = encoded_or_counted(record, tokenizer)
    if encoded is None:
        return
    prompt, whole = encoded
    for response, ids in zip(responses, whole, strict=True):
        trained = tokenizer.decode(ids)
        assert response.strip() in trained
        # Nothing but its own text, white space and an end of turn.
        rest = trained.replace(response if response in trained else response.strip(), "", 1)
        assert rest.strip() in ("", "</s>", end.strip(), end.strip() + "</s>")
        if response not in trained:
            assert report.notes.get(TRIMMED) == [3]
    assert "<|assistant|>" in tokenizer.decode(prompt)
