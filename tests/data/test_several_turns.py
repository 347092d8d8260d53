"""Candidates of several turns: the assistant's turns are ranked, each with its end; whatever else
is in them is context. Expected texts have context in square brackets."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from char_tokenizer import make_tokenizer
from chat_templates import (
    ASK,
    CALLS,
    CHAT,
    COLON,
    CONTENTS,
    ENDS,
    HI,
    HISTORY,
    LEADS,
    MISTRAL,
    OPEN,
    OTHER,
    QWEN,
    R1,
    START,
    TRIM,
    UPPER,
    answer,
    assembled,
    call,
    encoded_or_counted,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastrank.data.columns import group_sizes, groups_digest, largest_ids
from fastrank.data.group import BOUNDARY, Group, example_parts, example_text
from fastrank.data.load import load_groups
from fastrank.data.records import Record
from fastrank.data.render import CHANGED, HIDDEN_PROMPT, NEEDS_TEMPLATE, PARTED, PLAIN, TRIMMED
from fastrank.data.report import CUT_SAMPLE, NO_PROMPT, NO_RANKED, NO_TURN, SAME_PAIRS
from fastrank.data.tokenize import TokenizeOptions
from fastrank.data.turns import NEEDS_PLACES, SEVERAL, UNKNOWN_ROLE, ranked_tokens


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def tool(content: str) -> dict[str, str]:
    return {"role": "tool", "content": content}


WHY, SO = user("why"), user("so")
NEXT = "[<|user|>why<|end|><|assistant|>]"
CLOCK = '<call>{"name": "clock", "arguments": {}}</call>'
ASKED = "[INST] hi[/INST]"


def shown(group: Group, tokenizer: Any) -> list[str]:
    """The responses, context in square brackets."""
    out = []
    for ids in group.marked:
        text, before = "", True
        for token in ids.tolist():
            text += "" if (token >= 0) == before else "[" if before else "]"
            before = token >= 0
            text += tokenizer.decode([token if before else ~token])
        out.append(text if before else text + "]")
    return out


class Case(NamedTuple):
    """Fields of a row; the template; the prompt and the responses, or the reason to drop."""

    row: dict[str, Any]
    template: str | None
    expected: tuple[str, list[str]] | str
    notes: tuple[str, ...] = ()
    counts: dict[str, int] = {}


def several(*responses: Any, prompt: Any = HI, **more: Any) -> dict[str, Any]:
    scores = [float(-i) for i in range(len(responses))]
    return {"prompt": prompt, "responses": list(responses), "scores": scores, **more}


TALK = [answer("c"), WHY, answer("d")]
OTHER_TALK = [answer("e"), SO, answer("f"), WHY]

CASES = {
    "two turns, and one, and one left open": Case(
        several(TALK, "g", OTHER_TALK), CHAT,
        (ASK, [f"c<|end|>{NEXT}d<|end|>", "g<|end|>",
               "e<|end|>[<|user|>so<|end|><|assistant|>]f<|end|>"])),
    "a text prompt": Case(several(TALK, "g", prompt="hi"), CHAT,
                          (ASK, [f"c<|end|>{NEXT}d<|end|>", "g<|end|>"])),
    "the prompt repeated": Case(
        several([*HI, *TALK], [*HI, answer("g")]), CHAT,
        (ASK, [f"c<|end|>{NEXT}d<|end|>", "g<|end|>"])),
    "the text prompt repeated": Case(
        several([*HI, *TALK], [*HI, answer("g")], prompt="hi", system="s"), CHAT,
        ("<|system|>s<|end|>" + ASK, [f"c<|end|>{NEXT}d<|end|>", "g<|end|>"])),
    "context first": Case(
        several([SO, answer("c")], TALK, prompt=[*HI, answer("b"), WHY]), CHAT,
        (ASK + "b<|end|><|user|>why<|end|>",
         ["[<|user|>so<|end|><|assistant|>]c<|end|>", f"[<|assistant|>]c<|end|>{NEXT}d<|end|>"])),
    "roles of others": Case(
        several([{"role": "model", "content": "c"}, WHY, {"role": "bot", "content": "d"}], "e"),
        CHAT, ("<|user|>hi<|end|>",
               ["[<|model|>]c<|end|>[<|user|>why<|end|><|bot|>]d<|end|>",
                "[<|assistant|>]e<|end|>"])),
    "trim": Case(several([answer(" c "), WHY, answer("d\n")], TALK), TRIM,
                 (ASK, [f"c<|end|>{NEXT}d<|end|>", f"c<|end|>{NEXT}d<|end|>"]), (TRIMMED,),
                 {SAME_PAIRS: 1}),
    "context that is changed": Case(
        several([answer("C"), WHY, answer("4")], "D"), UPPER,
        ("<|user|>HI<|end|><|assistant|>",
         ["C<|end|>[<|user|>WHY<|end|><|assistant|>]4<|end|>", "D<|end|>"]), (HIDDEN_PROMPT,)),
    "a turn that is changed": Case(several(TALK, "D"), UPPER, CHANGED),
    "thoughts of an earlier turn": Case(
        several([answer("<think>a</think>c"), WHY, answer("d")], "e"), R1, CHANGED),
    "thoughts of the last turn": Case(
        several([answer("c"), WHY, answer("<think>a</think>d")], "e"), R1, CHANGED),
    "a thought opened": Case(several(TALK, "e"), R1,
                             (ASK, [f"c<|end|>{NEXT}d<|end|>", "e<|end|>"]), (PARTED,)),
    "places for thoughts": Case(
        several(TALK, "e"), QWEN,
        (ASK + "<think>\n\n</think>\n\n",
         ["c<|end|>[<|user|>why<|end|><|assistant|><think>\n\n</think>\n\n]d<|end|>", "e<|end|>"]),
        (PARTED,)),
    "reasoning": Case(
        several([answer("c", reasoning_content="a"), WHY, answer("d", reasoning_content="b")],
                [answer("e", reasoning_content=""), WHY, answer("f")]), QWEN,
        (ASK, [f"<think>\na\n</think>\n\nc<|end|>{NEXT}<think>\nb\n</think>\n\nd<|end|>",
               "<think>\n\n</think>\n\ne<|end|>[<|user|>why<|end|><|assistant|>"
               "<think>\n\n</think>\n\n]f<|end|>"]), (PARTED,)),
    "reasoning that is not shown": Case(
        several([answer("c", reasoning_content="a"), WHY, answer("d")], "e"), CHAT, CHANGED),
    "tools": Case(
        several([call({}), tool("noon"), answer("d")], [call({}), tool("no"), call({"x": "y"})]),
        CALLS,
        (ASK, [f"{CLOCK}<|end|>[<|tool|>noon<|end|><|assistant|>]d<|end|>",
               f"{CLOCK}<|end|>[<|tool|>no<|end|><|assistant|>]"
               '<call>{"name": "clock", "arguments": {"x": "y"}}</call><|end|>'])),
    "tools, and thoughts in the last turn alone": Case(
        several([call({}), tool("noon"), answer("d"), WHY, answer("e")], "f"), HISTORY,
        (ASK, [f"{CLOCK}<|end|>[<|tool|>noon<|end|><|assistant|>]d<|end|>[<|user|>why<|end|>"
               "<|assistant|><think>\n\n</think>\n\n]e<|end|>",
               "[<think>\n\n</think>\n\n]f<|end|>"]), (PARTED,)),
    "a turn of nobody known": Case(
        several([{"role": "function_call", "content": "c"}, tool("x"), answer("d")], "e"), CHAT,
        UNKNOWN_ROLE),
    "tools that are not shown": Case(
        several([call({}), tool("noon"), answer("d")], "e"), CHAT, CHANGED),
    "users and assistant by turns": Case(
        several(TALK, [call({}), tool("noon"), answer("d")]), MISTRAL,
        (ASKED, [" c</s>[[INST] why[/INST]] d</s>",
                 '[CALLS] [{"function": {"name": "clock", "arguments": {}}}]</s>'
                 "[[RESULT] noon[/RESULT]] d</s>"])),
    "users and assistant not by turns": Case(
        several([answer("c"), answer("d")], TALK), MISTRAL, "refused by the chat template"),
    "no end of turn": Case(several(TALK, "e"), COLON,
                           ("user: hi\nassistant:",
                            [" c[\nuser: why\nassistant:] d</s>", " e</s>"])),
    "a turn opened otherwise": Case(
        several(TALK, "e"), OTHER,
        ("<|user|>\nhi<|end|><|assistant|>\n",
         ["c<|end|>[<|user|>\nwhy<|end|><|assistant|>\n]d<|end|>", "e<|end|>"]), (PARTED,)),
    "no template": Case(
        several(TALK, [SO, answer("e")]), None,
        ("<s>User: hi\n\n",
         ["[Assistant:] c[\n\nUser: why\n\nAssistant:] d</s>", "[User: so\n\nAssistant:] e</s>"]),
        (PLAIN,)),
    "no template for calls": Case(several([call({}), tool("a"), answer("b")], "c"), None,
                                  NEEDS_TEMPLATE),
    "a cut sample": Case(
        several(TALK, TALK, ended=["length", "stop"]), CHAT,
        (ASK, [f"c<|end|>{NEXT}d", f"c<|end|>{NEXT}d<|end|>"]), (), {CUT_SAMPLE: 1}),
    "a blank turn": Case(several([answer("c"), WHY, answer(" ")], TALK), CHAT,
                         (ASK, [f"c<|end|>{NEXT} <|end|>", f"c<|end|>{NEXT}d<|end|>"])),
    # ---- pairs
    "a pair parted early": Case(
        {"chosen": [*HI, *TALK], "rejected": [*HI, *OTHER_TALK]}, CHAT,
        (ASK, [f"c<|end|>{NEXT}d<|end|>", "e<|end|>[<|user|>so<|end|><|assistant|>]f<|end|>"])),
    "a pair of two lengths": Case(
        {"chosen": [*HI, *TALK], "rejected": [*HI, answer("e")]}, CHAT,
        (ASK, [f"c<|end|>{NEXT}d<|end|>", "e<|end|>"])),
    "a pair parted at a question": Case(
        {"chosen": [*HI, *TALK], "rejected": [*HI, answer("c"), SO, answer("f")]}, CHAT,
        (ASK + "c<|end|><|user|>",
         ["[why<|end|><|assistant|>]d<|end|>", "[so<|end|><|assistant|>]f<|end|>"])),
    "a pair behind a prompt": Case(
        {"prompt": HI, "chosen": TALK, "rejected": OTHER_TALK}, CHAT,
        (ASK, [f"c<|end|>{NEXT}d<|end|>", "e<|end|>[<|user|>so<|end|><|assistant|>]f<|end|>"])),
    "a pair of a text prompt and a common turn": Case(
        {"prompt": "hi", "chosen": TALK, "rejected": [answer("c"), WHY, answer("e")]}, CHAT,
        (ASK + "c<|end|><|user|>why<|end|><|assistant|>", ["d<|end|>", "e<|end|>"])),
    "a pair that ends with questions": Case(
        {"chosen": [*HI, answer("c"), WHY], "rejected": [*HI, answer("d"), SO]}, CHAT,
        (ASK, ["c<|end|>", "d<|end|>"])),
    "a pair of nothing but questions": Case({"chosen": [*HI, WHY], "rejected": [*HI, SO]}, CHAT,
                                            "fewer than 2 candidates"),
    "a pair without a common turn": Case({"chosen": [SO, *TALK], "rejected": [*HI, *TALK]}, CHAT,
                                         NO_PROMPT),
    "ShareGPT": Case(
        {"chosen": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "c"},
                    {"from": "human", "value": "why"}, {"from": "gpt", "value": "d"}],
         "rejected": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "e"}]}, CHAT,
        (ASK, [f"c<|end|>{NEXT}d<|end|>", "e<|end|>"])),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_table(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    tokenizer = make_tokenizer(chat_template=case.template)
    path = tmp_path / "data.jsonl"
    # A second, harmless row, so that a file whose first record is dropped still leaves something.
    other = {"chosen": "x y", "rejected": "x z"} if "chosen" in case.row else several("y", "z")
    path.write_text(f"{json.dumps(case.row)}\n{json.dumps(other)}\n", encoding="utf-8")
    groups, report = load_groups(path, tokenizer)
    if isinstance(case.expected, str):
        assert report.dropped == {case.expected: [1]} and len(groups) == 1
        return
    assert report.dropped == {}
    prompt, responses = case.expected
    assert tokenizer.decode(groups[0].prompt_ids) == prompt
    assert shown(groups[0], tokenizer) == responses
    for ids in groups[0].response_ids:  # what the whole conversation is tokenised to
        text = tokenizer.decode([*groups[0].prompt_ids, *ids])
        bare = tokenizer(text, add_special_tokens=False).input_ids
        assert bare == [*groups[0].prompt_ids, *ids]
    notes = {note for note, lines in report.notes.items() if 1 in lines} - {SEVERAL}
    assert notes == set(case.notes)
    assert {what: len(lines) for what, lines in report.counts.items()} == case.counts
    masked = any("[" in text for text in responses)
    assert (groups[0].ranked is not None) == masked


def test_flat_rows_of_one_text_prompt_are_one_group() -> None:
    said = [TALK, "g", [*HI, answer("e"), SO, answer("f")]]
    rows = [{"prompt": "hi", "response": one, "score": -i} for i, one in enumerate(said)]
    tokenizer = make_tokenizer(chat_template=CHAT)
    [group], _ = load_groups([*rows[:2], {**rows[1], "response": "h"}], tokenizer)
    assert shown(group, tokenizer) == [f"c<|end|>{NEXT}d<|end|>", "g<|end|>", "h<|end|>"]
    # A conversation that repeats the prompt begins behind it.
    [group], _ = load_groups([rows[1], rows[2]], tokenizer)
    assert shown(group, tokenizer)[1] == "e<|end|>[<|user|>so<|end|><|assistant|>]f<|end|>"


def test_a_token_across_an_edge_is_ranked() -> None:
    tokenizer = make_tokenizer([("Ġ", "d"), ("e", "Ċ")], chat_template=COLON)
    rows = [several(TALK, [answer("e"), WHY, answer("d")])]
    [group], _ = load_groups(rows, tokenizer)
    assert shown(group, tokenizer) == [
        " c[\nuser: why\nassistant:] d</s>",
        " e\n[user: why\nassistant:] d</s>",
    ]


def test_truncation_leaves_out_what_has_no_turn_of_the_assistant_left() -> None:
    rows = [several([SO, answer("abc")], TALK, [answer("e"), SO, answer("f")])]
    tokenizer = make_tokenizer(chat_template=CHAT)
    [group], report = load_groups(rows, tokenizer, options=TokenizeOptions(max_response_length=3))
    assert report.dropped_candidates == {NO_RANKED: [1]}
    assert shown(group, tokenizer) == ["[<|assistant|>]c<|end|>", "[<|assistant|>]e<|end|>"]
    assert group.rewards.tolist() == [-1.0, -2.0]
    again, report = load_groups(
        [*rows, several("y", "z")], tokenizer, options=TokenizeOptions(max_response_length=1)
    )
    assert len(again) == 1 and report.dropped == {"fewer than 2 candidates": [1]}
    assert report.candidates_read == 5 and report.candidates_kept == 2


def test_a_response_without_a_turn_of_the_assistant_is_counted() -> None:
    rows = [several([SO], user("x"), {"role": "someone", "content": "c"}, [SO, WHY], TALK, [])]
    [group], report = load_groups(rows, make_tokenizer(chat_template=CHAT))
    assert report.dropped_candidates == {NO_TURN: [1, 1, 1], "empty response": [1]}
    assert group.rewards.tolist() == [-2.0, -4.0]


def test_a_tokenizer_that_cannot_tell_places(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_tokenizer(chat_template=CHAT)
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    _, report = load_groups([several(TALK, TALK), several("y", "z")], tokenizer)
    assert report.dropped == {NEEDS_PLACES: [1]}

    class Lying:
        def __call__(self, text: str, **_: Any) -> dict[str, Any]:
            return {"input_ids": [7, 8], "offset_mapping": [(0, 0), (0, 0)]}

        def decode(self, ids: list[int], **_: Any) -> str:
            return "ab"[: len(ids)]

    lying: Any = Lying()
    assert ranked_tokens(lying, "ab", [(0, 1)]) == [True, True]
    assert ranked_tokens(lying, "ab", [(1, 2)]) is None


def test_the_cache_keeps_what_is_ranked(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(chat_template=CHAT)
    rows = [several(TALK, OTHER_TALK, "x"), several("y", "z"), several([SO, *TALK], TALK)]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows * 3), encoding="utf-8")
    plain, _ = load_groups(path, tokenizer)
    for _ in range(2):  # built, and opened
        table, _ = load_groups(path, tokenizer, cache_dir=tmp_path / "cache", num_proc=2)
        for index in (range(9), [8, 0, 4]):
            some, own = table.select(index), [plain[i] for i in index]  # type: ignore[attr-defined]
            for a, b in zip(some, own, strict=True):
                assert all(map(torch.equal, a.marked, b.marked)) and a.name == b.name
                assert torch.equal(a.prompt_ids, b.prompt_ids)
            assert groups_digest(some) == groups_digest(own)
            assert largest_ids(some).tolist() == largest_ids(own).tolist()
            assert vars(group_sizes(some)).keys() == vars(group_sizes(own)).keys()
            for name, values in vars(group_sizes(own)).items():
                assert getattr(group_sizes(some), name).tolist() == values.tolist(), name
    path.write_text(json.dumps(rows[1]) + "\n", encoding="utf-8")
    table, _ = load_groups(path, tokenizer, cache_dir=tmp_path / "cache")
    assert not table.masked and table[0].ranked is None  # type: ignore[attr-defined]


def test_an_example_shows_what_is_ranked() -> None:
    tokenizer = make_tokenizer(chat_template=CHAT)
    [group], _ = load_groups([several(TALK, "g")], tokenizer)
    parts = example_parts(group, tokenizer)
    assert parts["ranked"] == ["c<|end|>", "d<|end|>"]
    assert parts["prompt"] + parts["response"] == (
        "<|user|>hi<|end|><|assistant|>c<|end|><|user|>why<|end|><|assistant|>d<|end|>"
    )
    cut = BOUNDARY
    text = f"{ASK}{cut}c<|end|>{cut}<|user|>why<|end|><|assistant|>{cut}d<|end|>"
    assert text in example_text(group, tokenizer)
    [group], _ = load_groups([several([SO, answer("c")], TALK)], tokenizer)
    assert example_parts(group, tokenizer)["ranked"] == ["c<|end|>"]
    assert f"{cut}{cut}<|user|>so<|end|><|assistant|>{cut}c" in example_text(group, tokenizer)


def test_templates_that_mark_what_they_generate_agree() -> None:
    """transformers' own masks, of templates with ``{% generation %}``."""
    said = "{% generation %}{{ m.content }}<|end|>{% endgeneration %}"
    template = (
        START
        + "{% if m.role == 'assistant' %}"
        + said
        + "{% else %}{{ m.content }}<|end|>{% endif %}"
    ) + OPEN
    tokenizer = make_tokenizer(chat_template=template)
    talks = [TALK, [answer("long one"), tool("x"), answer("f")], [SO, answer(" é\n")]]
    [group], _ = load_groups([several(*talks)], tokenizer)
    for talk, ids in zip(talks, group.marked, strict=True):
        made = tokenizer.apply_chat_template(
            [*HI, *talk], return_dict=True, return_assistant_tokens_mask=True
        )
        count = len(group.prompt_ids)
        assert [*group.prompt_ids, *torch.where(ids >= 0, ids, ~ids)] == made["input_ids"]
        assert (ids >= 0).long().tolist() == made["assistant_masks"][count:]


contents = (
    st.text("ab4 \n<>", max_size=8) | st.sampled_from(["<think>a</think>4", "<|end|>", "user"])
).filter(str.strip)
talks = st.lists(
    st.builds(lambda role, text: {"role": role, "content": text},
              st.sampled_from(["assistant", "user", "tool"]), contents),
    max_size=4,
)  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    content=st.sampled_from(CONTENTS),
    lead=st.sampled_from(LEADS),
    opened=st.sampled_from(LEADS),
    end=st.sampled_from(ENDS),
    before=st.lists(talks, min_size=2, max_size=3),
    last=st.lists(contents, min_size=3, max_size=3),
    ask=contents,
)
def test_any_template_shows_every_turn_or_the_record_is_counted(
    content: str, lead: str, opened: str, end: str, before: list[Any], last: list[str], ask: str
) -> None:
    whole = [[*turns, answer(text)] for turns, text in zip(before, last, strict=False)]
    said = [turns if len(turns) > 1 else turns[0]["content"] for turns in whole]
    if all(isinstance(one, str) for one in said):
        return
    tokenizer = make_tokenizer(chat_template=assembled(content, lead, opened, end))
    record = Record([user(ask)], [""] * len(said), [0.0] * len(said), 3, turns=tuple(said))
    encoded, report = encoded_or_counted(record, tokenizer)
    if encoded is None:
        return
    prompt, responses = encoded
    assert min(prompt) >= 0
    for turns, ids in zip(whole, responses, strict=True):
        group = Group.of_marked(torch.tensor(prompt), [torch.tensor(ids)], torch.zeros(1), "one")
        text = shown(group, tokenizer)[0]
        ranked = "".join(tokenizer.decode([token]) for token in ids if token >= 0)
        # Every turn of the assistant in its order, its end included, and nothing else.
        pattern = ""
        for turn in turns:
            if turn["role"] == "assistant":
                said_text = turn["content"]
                either = f"({re.escape(said_text)}|{re.escape(said_text.strip())})"
                pattern += rf"\s*{either}\s*{re.escape(end.strip())}"
        assert re.fullmatch(pattern + ("" if end.strip() else r"\s*</s>"), ranked), text
