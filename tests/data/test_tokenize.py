"""Where the prompt ends, how responses end, and what is cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from char_tokenizer import make_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fastrank.data.load import fit_context, load_groups
from fastrank.data.records import Record
from fastrank.data.render import render_plain
from fastrank.data.report import Report
from fastrank.data.tokenize import TokenizeOptions, tokenize_record
from fastrank.errors import InputError

CHAT = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
NO_END = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def record(prompt: Any, *responses: str) -> Record:
    return Record(prompt, list(responses), [float(-i) for i in range(len(responses))], 7)


def ids(
    item: Record, tokenizer: PreTrainedTokenizerBase, report: Report | None = None, **options: Any
) -> tuple[list[int], list[list[int]]] | None:
    report = Report() if report is None else report
    report.add_read(len(item.scores))
    report.keep(item.scores)
    group = tokenize_record(item, tokenizer, TokenizeOptions(**options), report)
    if group is None:
        return None
    return group.prompt_ids.tolist(), [r.tolist() for r in group.response_ids]


def text(tokenizer: PreTrainedTokenizerBase, item: Record, **options: Any) -> tuple[str, list[str]]:
    found = ids(item, tokenizer, **options)
    assert found is not None
    return tokenizer.decode(found[0]), [tokenizer.decode(r) for r in found[1]]


def test_text_gets_one_bos_and_eos() -> None:
    tokenizer = make_tokenizer()
    assert text(tokenizer, record("ab ", "c", "de")) == ("<s>ab ", ["c</s>", "de</s>"])
    # A BOS that the text itself brings, or an EOS that a response already ends with, stays alone.
    assert text(tokenizer, record("<s>ab", "c</s>", "d")) == ("<s>ab", ["c</s>", "d</s>"])


def test_no_bos_for_tokenizers_that_add_none() -> None:
    tokenizer = make_tokenizer(adds_bos=False)
    assert text(tokenizer, record("ab", "c")) == ("ab", ["c</s>"])


def test_a_token_across_the_boundary_belongs_to_the_responses() -> None:
    tokenizer = make_tokenizer([("b", "c")])
    # Only the first response merges; the prompt is cut for both, so that it stays common.
    assert text(tokenizer, record("ab", "cd", "xd")) == ("<s>a", ["bcd</s>", "bxd</s>"])


def test_responses_with_a_common_beginning_keep_it() -> None:
    tokenizer = make_tokenizer()
    assert text(tokenizer, record("ab", "same one", "same two")) == (
        "<s>ab",
        ["same one</s>", "same two</s>"],
    )


def test_joint_tokens_are_those_of_the_whole_text() -> None:
    tokenizer = make_tokenizer([("b", "c"), ("bc", "d")])
    item = record("aab", "cd", "cx", "b")
    found = ids(item, tokenizer)
    assert found is not None
    for response, got in zip(item.responses, found[1], strict=True):
        assert found[0] + got == [*tokenizer(item.prompt + response).input_ids, 1]


def test_a_boundary_that_leaves_no_prompt_is_forced() -> None:
    tokenizer = make_tokenizer([("b", "c")], adds_bos=False)
    report = Report()
    found = ids(record("b", "cd", "x"), tokenizer, report)
    assert found is not None
    assert tokenizer.decode(found[0]) == "b"
    assert [tokenizer.decode(r) for r in found[1]] == ["cd</s>", "x</s>"]
    assert report.forced_boundaries == [7]
    assert "1 records: prompt and responses tokenised apart (line 7)" in report.as_text()


def test_an_empty_prompt_starts_from_bos_or_is_dropped() -> None:
    assert text(make_tokenizer(), record("", "c")) == ("<s>", ["c</s>"])
    assert text(make_tokenizer(adds_bos=False), record("", "c")) == ("<s>", ["c</s>"])
    report = Report()
    assert ids(record("", "c", "d"), make_tokenizer(adds_bos=False, bos=None), report) is None
    assert report.dropped == {"prompt without a token": [7]}
    assert (report.kept, report.candidates_kept, report.candidates_per_group) == (0, 0, {})


def test_bos_that_is_also_eos_is_not_doubled(story_model_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(story_model_path)
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == 1
    found = ids(record("Once upon", " a time", " a hill"), tokenizer)
    assert found is not None
    prompt, responses = found
    assert prompt == tokenizer("Once upon").input_ids and prompt.count(1) == 1
    for response in responses:
        assert response[-1] == 1 and response.count(1) == 1


def test_chat_template_ends_the_turn_itself() -> None:
    tokenizer = make_tokenizer(chat_template=CHAT)
    turns = [{"role": "user", "content": "hi"}]
    assert text(tokenizer, record(turns, "c", "d\n")) == (
        "<s><|user|>hi<|end|>\n<|assistant|>",
        ["c<|end|>", "d\n<|end|>"],
    )


def test_chat_template_without_an_end_gets_eos() -> None:
    tokenizer = make_tokenizer(chat_template=NO_END)
    turns = [{"role": "user", "content": "hi"}]
    assert text(tokenizer, record(turns, "c", "d")) == (
        "<|user|>hi<|assistant|>",
        ["c</s>", "d</s>"],
    )


def test_messages_without_a_template_are_rendered_plainly() -> None:
    turns = [
        {"role": "user", "content": "hi "},
        {"role": "assistant", "content": "yes?"},
        {"role": "user", "content": "go"},
    ]
    plain = "User: hi\n\nAssistant: yes?\n\nUser: go\n\nAssistant:"
    assert render_plain(turns) == plain
    assert text(make_tokenizer(), record(turns, "c", " d")) == (
        "<s>" + plain,
        [" c</s>", " d</s>"],
    )


def test_text_as_chat() -> None:
    tokenizer = make_tokenizer(chat_template=CHAT)
    assert text(tokenizer, record("hi", "c")) == ("<s>hi", ["c</s>"])
    assert text(tokenizer, record("hi", "c"), as_chat=True) == (
        "<s><|user|>hi<|end|>\n<|assistant|>",
        ["c<|end|>"],
    )


def test_a_template_that_refuses_drops_the_record() -> None:
    tokenizer = make_tokenizer(
        chat_template="{% if messages[0].role == 'system' %}"
        "{{ raise_exception('no system role') }}{% endif %}" + CHAT
    )
    report = Report()
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]
    assert ids(record(turns, "c", "d"), tokenizer, report) is None
    assert report.dropped == {"refused by the chat template": [7]}
    assert report.dropped_candidates == {"in a dropped record": [7, 7]}


def test_a_template_that_says_nothing_drops_the_record() -> None:
    report = Report()
    turns = [{"role": "user", "content": "hi"}]
    tokenizer = make_tokenizer(chat_template="{% if add_generation_prompt %}x{% endif %}")
    assert ids(record(turns, "c", "d"), tokenizer, report) is None
    assert report.dropped == {"response that the chat template leaves out or changes": [7]}


def test_no_eos_token_is_an_error() -> None:
    with pytest.raises(InputError, match="has no EOS token"):
        ids(record("a", "b"), make_tokenizer(eos=None))
    turns = [{"role": "user", "content": "hi"}]
    tokenizer = make_tokenizer(eos=None, chat_template=CHAT)
    assert text(tokenizer, record(turns, "c"))[1] == ["c<|end|>"]


@pytest.mark.parametrize(
    ("options", "expected", "truncated"),
    [
        ({}, ("<s>abcdef", ["uvwxyz</s>", "k</s>"]), {}),
        ({"max_prompt_length": 3}, ("<s>ef", ["uvwxyz</s>", "k</s>"]), {"prompt": [7]}),
        ({"max_prompt_length": 1}, ("f", ["uvwxyz</s>", "k</s>"]), {"prompt": [7]}),
        ({"max_response_length": 2}, ("<s>abcdef", ["uv", "k</s>"]), {"response": [7]}),
        ({"max_length": 14}, ("<s>abcdef", ["uvwxyz</s>", "k</s>"]), {}),
        # The prompt gives way first, down to half of the limit, then the responses.
        ({"max_length": 13}, ("<s>bcdef", ["uvwxyz</s>", "k</s>"]), {"prompt": [7]}),
        (
            {"max_length": 12},
            ("<s>bcdef", ["uvwxyz", "k</s>"]),
            {"prompt": [7], "response": [7]},
        ),
        ({"max_length": 6}, ("<s>ef", ["uvw", "k</s>"]), {"prompt": [7], "response": [7]}),
        ({"max_length": 2}, ("f", ["u", "k"]), {"prompt": [7], "response": [7, 7]}),
        (
            {"max_length": 9, "max_response_length": 2},
            ("<s>abcdef", ["uv", "k</s>"]),
            {"response": [7]},
        ),
    ],
)
def test_truncation(options: dict, expected: tuple, truncated: dict) -> None:
    tokenizer = make_tokenizer()
    report = Report()
    found = ids(record("abcdef", "uvwxyz", "k"), tokenizer, report, **options)
    assert found is not None
    assert (tokenizer.decode(found[0]), [tokenizer.decode(r) for r in found[1]]) == expected
    assert report.truncated == truncated
    limit = options.get("max_length")
    assert limit is None or len(found[0]) + max(map(len, found[1])) <= limit


def test_short_prompts_leave_the_context_to_the_responses() -> None:
    found = ids(record("a", "x" * 50), make_tokenizer(), max_length=20)
    assert found is not None and len(found[0]) == 2 and len(found[1][0]) == 18


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_prompt_length": 0}, "max_prompt_length must be at least 1, got 0"),
        ({"max_response_length": -1}, "max_response_length must be at least 1, got -1"),
        ({"max_length": 1}, "max_length must be at least 2, got 1"),
    ],
)
def test_impossible_limits(options: dict, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        TokenizeOptions(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"max_length": 33},
        {"max_prompt_length": 20, "max_response_length": 13},
        {"max_prompt_length": 32},
        {"max_response_length": 32},
    ],
)
def test_limits_beyond_the_context_are_refused(options: dict) -> None:
    with pytest.raises(InputError, match="must fit the model's context of 32 tokens"):
        fit_context(TokenizeOptions(**options), 32)


def test_limits_within_the_context_stay() -> None:
    options = TokenizeOptions(max_prompt_length=20, max_response_length=12)
    assert fit_context(options, 32).max_length == 32
    assert fit_context(TokenizeOptions(max_length=9), 32).max_length == 9
    assert fit_context(options, None) == options


def test_load_groups_refuses_what_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"prompt": "", "responses": ["a", "b"], "scores": [1, 0]}))
    tokenizer = make_tokenizer(adds_bos=False, bos=None)
    with pytest.raises(InputError, match="no usable record: 1 read, 1 prompt without a token"):
        load_groups(path, tokenizer)


def test_oasst_is_accounted_for(oasst_path: Path, story_model_path: Path) -> None:
    """212 lists, 641 replies: nothing dropped, every cut in the report is a cut in the ids."""
    tokenizer = AutoTokenizer.from_pretrained(story_model_path)
    whole, untouched = load_groups(oasst_path, tokenizer)
    groups, report = load_groups(oasst_path, tokenizer, context_length=512)
    assert (untouched.read, untouched.kept, untouched.truncated) == (212, 212, {})
    assert (report.read, report.kept, report.candidates_kept) == (212, 212, 641)
    assert report.dropped == report.dropped_candidates == {} and report.tied_pairs == 0

    cut: dict[str, list[int]] = {"prompt": [], "response": []}
    for line, (before, after) in enumerate(zip(whole, groups, strict=True), start=1):
        assert after.name == f"{oasst_path}:{line}"
        prompt, kept = before.prompt_ids.tolist(), after.prompt_ids.tolist()
        if kept != prompt:
            cut["prompt"].append(line)
            assert kept == [1, *prompt[len(prompt) - len(kept) + 1 :]]
        for full, short in zip(before.response_ids, after.response_ids, strict=True):
            assert short.tolist() == full[: len(short)].tolist()
            assert len(kept) + len(short) <= 512
            if len(short) < len(full):
                cut["response"].append(line)
    assert {k: sorted(v) for k, v in report.truncated.items()} == cut

    with oasst_path.open() as file:
        for line, group in zip(file, whole, strict=True):
            raw = json.loads(line)
            text = render_plain(raw["prompt"])
            ranks = raw["ranks"]
            assert group.rewards.tolist() == [max(ranks) - rank for rank in ranks]
            for response, got in zip(raw["responses"], group.response_ids, strict=True):
                joint = tokenizer(f"{text} {response.strip()}").input_ids
                assert group.prompt_ids.tolist() + got.tolist() == [*joint, 1]
