"""The same content in every format gives the same records and groups."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from fastrank.data.load import load_groups
from fastrank.data.records import Record, read_records
from fastrank.data.report import Report

# Three prompts, ragged, one tie; every list is best first, so that best-first files can say it too.
CONTENT = [
    ("Name a colour", ["red", "blué 🟦", "table"], [3.0, 1.0, 1.0]),
    ("Count to two", ["one two", "two"], [2.0, 0.0]),
    ("Say hi", ["hi", "hello", "bye", "no"], [0.9, 0.5, 0.25, 0.1]),
]
RANKED = [(p, r, [float(len(r) - 1 - i) for i in range(len(r))]) for p, r, _ in CONTENT]
PAIRS = [(p, [r[0], r[-1]], [1.0, 0.0]) for p, r, _ in CONTENT]


def _canonical(prompt: str, responses: list[str], scores: list[float]) -> list[dict]:
    return [{"prompt": prompt, "responses": responses, "scores": scores}]


def _ranks(prompt: str, responses: list[str], scores: list[float]) -> list[dict]:
    return [{"prompt": prompt, "responses": responses, "ranks": [max(scores) - s for s in scores]}]


def _rrhf(prompt: str, responses: list[str], scores: list[float]) -> list[dict]:
    return [{"query": prompt, "responses": responses, "scores": scores}]


def _pro(prompt: str, responses: list[str], scores: list[float]) -> list[dict]:
    prefix = [[prompt[:4], prompt[4:]]] * len(responses)
    return [{"prefix": prefix, "suffix": responses, "reward": scores, "sft_index": 0}]


def _pro_text(prompt: str, responses: list[str], scores: list[float]) -> list[dict]:
    return [{"prefix": [prompt] * len(responses), "suffix": responses, "reward": scores}]


def _ultrafeedback(prompt: str, responses: list[str], scores: list[float]) -> list[dict]:
    pairs = zip(responses, scores, strict=True)
    completions = [{"response": r, "overall_score": s, "model": "m"} for r, s in pairs]
    return [{"source": "x", "instruction": prompt, "completions": completions}]


def _nectar(prompt: str, responses: list[str], scores: list[float]) -> list[dict]:
    pairs = zip(responses, scores, strict=True)
    answers = [{"answer": r, "rank": max(scores) + 1 - s} for r, s in pairs]
    return [{"prompt": prompt, "answers": answers, "turns": 1}]


def _all_rm_scores(prompt: str, responses: list[str], scores: list[float]) -> list[dict]:
    return [
        {"prompt": prompt, "all_generated_responses": responses, "all_rm_scores": scores,
         "chosen": [{"role": "user", "content": "ignored"}], "rejected": []}
    ]  # fmt: skip


def _flat(prompt: str, responses: list[str], scores: list[float]) -> list[dict]:
    pairs = zip(responses, scores, strict=True)
    return [{"prompt": prompt, "response": r, "helpfulness": s, "verbosity": 1} for r, s in pairs]


def _best_first(prompt: str, responses: list[str], scores: list[float]) -> list[dict]:
    return [{"prompt": prompt, "responses": responses}]


def _preference(prompt: str, responses: list[str], scores: list[float]) -> list[dict]:
    return [{"prompt": prompt, "chosen": responses[0], "rejected": responses[1]}]


def _implicit(prompt: str, responses: list[str], scores: list[float]) -> list[dict]:
    start = f"\n\nHuman: {prompt}\n\nAssistant:"
    return [{"chosen": start + responses[0], "rejected": start + responses[1]}]


def _messages(prompt: str, responses: list[str], scores: list[float]) -> list[dict]:
    user = {"role": "user", "content": prompt}
    ends = [[user, {"role": "assistant", "content": r}] for r in responses]
    return [{"prompt": prompt, "chosen": ends[0], "rejected": ends[1]}]


FORMATS: dict[str, tuple[str, Callable[..., list[dict]], list]] = {
    "canonical": ("canonical", _canonical, CONTENT),
    "ranks": ("canonical", _ranks, CONTENT),
    "rrhf": ("rrhf", _rrhf, CONTENT),
    "pro": ("pro", _pro, CONTENT),
    "pro text": ("pro", _pro_text, CONTENT),
    "ultrafeedback": ("ultrafeedback", _ultrafeedback, CONTENT),
    "nectar": ("nectar", _nectar, CONTENT),
    "all_rm_scores": ("all_rm_scores", _all_rm_scores, CONTENT),
    "flat": ("flat", _flat, CONTENT),
    "best_first": ("best_first", _best_first, RANKED),
    "preference": ("preference", _preference, PAIRS),
}


def _rows(make: Callable[..., list[dict]], content: list) -> list[dict]:
    return [row for item in content for row in make(*item)]


def write(path: Path, rows: list[dict]) -> Path:
    """Rows as JSONL, JSON or Parquet, by the path's suffix."""
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False, indent=1))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _plain(records: list[Record]) -> list[tuple]:
    return [(r.prompt, r.responses, r.scores) for r in records]


def _shift(scores: list[float]) -> list[float]:
    """Ranks know no zero point: compare scores relative to the group's lowest."""
    return [pytest.approx(s - min(scores)) for s in scores]


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    """One token a word, EOS of its own, no BOS."""
    vocabulary = {"<eos>": 0, "<unk>": 1}
    for prompt, responses, _ in CONTENT:
        for word in " ".join([prompt, *responses]).split():
            vocabulary.setdefault(word, len(vocabulary))
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_in_every_kind_of_file(
    name: str, suffix: str, tmp_path: Path, words: PreTrainedTokenizerFast
) -> None:
    detected, make, content = FORMATS[name]
    path = write(tmp_path / f"data{suffix}", _rows(make, content))
    report = Report()
    records = list(read_records(path, report=report))
    assert report.format == detected
    assert [(r.prompt, r.responses) for r in records] == [(p, r) for p, r, _ in content]
    assert [_shift(r.scores) for r in records] == [
        [s - min(scores) for s in scores] for _, _, scores in content
    ]

    groups, _ = load_groups(path, words)
    plain = write(tmp_path / "plain.jsonl", _rows(_canonical, content))
    expected, _ = load_groups(plain, words)
    assert len(groups) == len(expected) == len(content)
    for got, want in zip(groups, expected, strict=True):
        assert torch.equal(got.prompt_ids, want.prompt_ids)
        assert [ids.tolist() for ids in got.response_ids] == [
            ids.tolist() for ids in want.response_ids
        ]
        shifted = got.rewards - got.rewards.min(), want.rewards - want.rewards.min()
        torch.testing.assert_close(*shifted)


def test_line_numbers_and_names(tmp_path: Path, words: PreTrainedTokenizerFast) -> None:
    text = "\n" + "\n\n".join(json.dumps(r) for r in _rows(_canonical, CONTENT)) + "\n"
    path = tmp_path / "gaps.jsonl"
    path.write_text("\ufeff" + text, encoding="utf-8")
    groups, _ = load_groups(path, words)
    assert [g.name for g in groups] == [f"{path}:{n}" for n in (2, 4, 6)]


def test_json_lines_under_a_json_name_and_rows_in_a_container(tmp_path: Path) -> None:
    rows = _rows(_canonical, CONTENT)
    lines = tmp_path / "lines.json"
    lines.write_text("".join(json.dumps(r) + "\n" for r in rows))
    held = tmp_path / "held.json"
    held.write_text(json.dumps({"version": 1, "data": rows}, indent=2))
    single = tmp_path / "single.json"
    single.write_text(json.dumps(rows[0]))
    assert _plain(list(read_records(lines))) == CONTENT
    assert _plain(list(read_records(held))) == CONTENT
    assert _plain(list(read_records(single))) == CONTENT[:1]


def test_implicit_prompts(tmp_path: Path) -> None:
    path = write(tmp_path / "hh.jsonl", _rows(_implicit, PAIRS))
    for record, (prompt, responses, scores) in zip(read_records(path), PAIRS, strict=True):
        assert record.prompt == f"\n\nHuman: {prompt}\n\nAssistant:"
        assert record.responses == responses
        assert record.scores == scores
    # Without the marker the cut is at white space, not inside the common "t" of "two" and "ten".
    path = write(tmp_path / "text.jsonl", [{"chosen": "I count two", "rejected": "I count ten"}])
    (record,) = read_records(path)
    assert (record.prompt, record.responses) == ("I count ", ["two", "ten"])


def test_a_prompt_repeated_in_both_texts_is_taken_off(tmp_path: Path) -> None:
    row = {"prompt": "Say: ", "chosen": "Say: yes", "rejected": "Say: no"}
    once = row | {"chosen": "yes"}
    both, single = read_records(write(tmp_path / "p.jsonl", [row, once]))
    assert (both.prompt, both.responses) == ("Say: ", ["yes", "no"])
    assert (single.prompt, single.responses) == ("Say: ", ["yes", "Say: no"])


def test_preference_messages(tmp_path: Path) -> None:
    path = write(tmp_path / "chat.jsonl", _rows(_messages, PAIRS))
    for record, (prompt, responses, _) in zip(read_records(path), PAIRS, strict=True):
        assert record.prompt == [{"role": "user", "content": prompt}]
        assert record.responses == responses
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    only = {"prompt": turns, "chosen": [{"role": "assistant", "content": "a"}],
            "rejected": {"role": "assistant", "content": "b"}}  # fmt: skip
    (record,) = read_records(write(tmp_path / "explicit.jsonl", [only]))
    assert (record.prompt, record.responses) == (turns, ["a", "b"])


def test_pro_turns_become_messages(tmp_path: Path) -> None:
    turns = ["<|prompter|>hi", "<|assistant|>hello", "<|prompter|>more?", "<|assistant|>"]
    row = {"prefix": [turns] * 2, "suffix": ["a", "b"], "reward": [1, 0]}
    shared = row | {"prefix": turns}
    for record in read_records(write(tmp_path / "pro.jsonl", [row, shared])):
        assert record.prompt == [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "hello"},
            {"role": "user", "content": "more?"},
        ]


def test_message_shapes(tmp_path: Path) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"text": "b"}]}]
    answer = {"role": "assistant", "content": "x"}
    row = {"prompt": parts, "responses": [answer, [answer | {"content": "y"}], "z"],
           "scores": [1, 2, 3]}  # fmt: skip
    (record,) = read_records(write(tmp_path / "m.jsonl", [row]))
    assert record.prompt == [{"role": "user", "content": "ab"}]
    assert record.responses == ["x", "y", "z"]


def test_flat_rows_are_gathered_across_the_file(tmp_path: Path) -> None:
    rows = _rows(_flat, CONTENT)
    mixed = rows[::2] + rows[1::2]
    path = write(tmp_path / "mixed.jsonl", mixed)
    found = {r.prompt: dict(zip(r.responses, r.scores, strict=True)) for r in read_records(path)}
    assert found == {p: dict(zip(r, s, strict=True)) for p, r, s in CONTENT}


def test_score_key(tmp_path: Path) -> None:
    row = {"prompt": "p", "responses": ["a", "b"], "scores": [1, 0], "mine": [0.25, 0.75]}
    path = write(tmp_path / "k.jsonl", [row])
    assert next(iter(read_records(path, score_key="mine"))).scores == [0.25, 0.75]
    completions = [{"response": "a", "overall_score": 1, "fine": 5}, {"response": "b", "fine": 6}]
    row = {"instruction": "p", "completions": completions}
    path = write(tmp_path / "u.jsonl", [row])
    assert next(iter(read_records(path, score_key="fine"))).scores == [5.0, 6.0]
    rows = [{"prompt": "p", "response": r, "mine": s} for r, s in (("a", 1), ("b", 2))]
    path = write(tmp_path / "f.jsonl", rows)
    assert next(iter(read_records(path, score_key="mine"))).scores == [1.0, 2.0]


def test_unscored_has_to_be_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "s.jsonl", [{"prompt": "p", "responses": ["a", "b"]}])
    assert next(iter(read_records(path))).scores == [1.0, 0.0]
    assert next(iter(read_records(path, format="unscored"))).scores == [0.0, 0.0]


def test_folder_and_splits_through_datasets(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", _rows(_canonical, CONTENT))
    write(folder / "test.jsonl", _rows(_canonical, CONTENT[:1]))
    assert _plain(list(read_records(folder))) == CONTENT
    assert _plain(list(read_records(f"{folder}:test"))) == CONTENT[:1]
