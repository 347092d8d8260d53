"""Small files of every format: what is read of them, what is dropped, or the error in one line."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from char_tokenizer import make_tokenizer

from fastrank.cli.inspect import InspectOptions
from fastrank.data.formats import FORMATS
from fastrank.data.load import load_groups
from fastrank.data.pairs import PARTED_EARLY
from fastrank.data.records import read_records
from fastrank.data.report import NO_PROMPT, NO_SCORE, Report
from fastrank.errors import InputError
from fastrank.workflow.items import file_identity, read_items

HI = [{"role": "user", "content": "hi"}]
BACK = [*HI, {"role": "assistant", "content": "hello"}, {"role": "user", "content": "more"}]


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def human(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


class Case(NamedTuple):
    """Rows of a file; (prompt, {response: score}) of each record, or an error; the format."""

    rows: list[dict[str, Any]]
    expected: list[tuple[Any, dict[str, float]]] | str
    format: str
    options: dict[str, Any] = {}
    dropped: dict[str, list[int]] = {}


def one(row: dict[str, Any], prompt: Any, scores: dict[str, float], format: str, **more) -> Case:
    return Case([row], [(prompt, scores)], format, **more)


AB = {"prompt": "q", "response_a": "x", "response_b": "y"}
PKU = {"prompt": "q", "response_0": "x", "response_1": "y", "better_response_id": 1}
SHP = {"history": "q", "human_ref_A": "x", "human_ref_B": "y", "score_A": 8, "score_B": 2}
STEER2 = {"prompt": "q", "response_1": "x", "response_2": "y"}
STEER3 = {"context": BACK, "response1": "x", "response2": "y", "overall_preference": -2}
WEB = {
    "question": {"full_text": "q"},
    "answer_0": "x",
    "answer_1": "y",
    "score_0": -1,
    "score_1": 1,
}
POST = {"post": "I did it.", "title": "Me", "subreddit": "tifu"}
TLDR = {"info": POST, "summaries": [{"text": " x"}, {"text": " y"}], "choice": 1}
POSTED = "SUBREDDIT: r/tifu\nTITLE: Me\nPOST: I did it.\nTL;DR:"
STEER = {"prompt": "q", "response": "x", "helpfulness": 4, "safety": 1}
HH = "\n\nHuman: hi\n\nAssistant:"


def node(role: str, text: str, *replies: Any, rank: int | None = None) -> dict[str, Any]:
    return {"role": role, "text": text, "replies": list(replies), "rank": rank}


TREE = node(
    "prompter", "hi",
    node("assistant", "x", rank=1),
    node("assistant", "y", node("prompter", "go", node("assistant", "u", rank=0),
                                node("assistant", "v", rank=1)), rank=0),
)  # fmt: skip
TREE_RECORDS = [
    (HI, {"x": 0, "y": 1}),
    ([*HI, said("y"), {"role": "user", "content": "go"}], {"u": 1, "v": 0}),
]


def messages(tree: dict[str, Any], parent: str | None = None) -> list[dict[str, Any]]:
    """A tree as one message per row."""
    name = f"{parent}/{tree['text']}"
    own = {"message_id": name, "parent_id": parent, "text": tree["text"], "role": tree["role"]}
    rows = [{**own, "rank": tree["rank"]}]
    return rows + [row for reply in tree["replies"] for row in messages(reply, name)]


CASES = {
    # lists
    "canonical": one({"prompt": "q", "responses": ["x", "y"], "scores": [1, 2]}, "q",
                     {"x": 1, "y": 2}, "canonical"),
    "ranks": one({"prompt": "q", "responses": ["x", "y"], "ranks": [2, 0]}, "q",
                 {"x": 0, "y": 2}, "canonical"),
    "best first": one({"prompt": "q", "responses": ["x", "y", "z"]}, "q",
                      {"x": 2, "y": 1, "z": 0}, "best_first"),
    "unscored": one({"prompt": "q", "responses": ["x", "y"]}, "q", {"x": 0, "y": 0}, "unscored",
                    options={"format": "unscored"}),
    "RRHF": one({"query": "q", "responses": ["x", "y"], "scores": [1, 2]}, "q",
                {"x": 1, "y": 2}, "rrhf"),
    "RRHF, scored": one({"prompt": "q", "response": ["x", "y"], "scores": [1, 2]}, "q",
                        {"x": 1, "y": 2}, "rrhf_scored"),
    "reward model": one(
        {"prompt": "q", "all_generated_responses": ["x", "y"], "all_rm_scores": [1, 2]}, "q",
        {"x": 1, "y": 2}, "all_rm_scores"),
    "PRO": one({"prefix": ["q", "q"], "suffix": ["x", "y"], "reward": [1, 2]}, "q",
               {"x": 1, "y": 2}, "pro"),
    "weighted lists": one(
        {"prompt": "q", "responses": ["x", "y"], "a": [1, 2], "b": [10, 0]}, "q",
        {"x": 3.5, "y": 1.0}, "canonical", options={"score_key": '{"a": 0.5, "b": 0.3}'}),
    # lists of objects, and structs of lists
    "UltraFeedback": one(
        {"instruction": "q", "completions": [{"response": "x", "overall_score": 1},
                                             {"response": "y", "overall_score": 2}]}, "q",
        {"x": 1, "y": 2}, "ultrafeedback"),
    "UltraFeedback as a struct": one(
        {"instruction": "q", "completions": {"response": ["x", "y"], "overall_score": [1, 2]}},
        "q", {"x": 1, "y": 2}, "ultrafeedback"),
    "UltraFeedback, weighted": one(
        {"instruction": "q", "completions": [{"response": "x", "a": 1, "b": 1},
                                             {"response": "y", "a": 2, "b": 0}]}, "q",
        {"x": 1, "y": 1.5}, "ultrafeedback", options={"score_key": {"a": 0.75, "b": 0.25}}),
    "Nectar": one({"prompt": "q", "answers": [{"answer": "x", "rank": 1},
                                              {"answer": "y", "rank": 2}]}, "q",
                  {"x": 1, "y": 0}, "nectar"),
    "StackExchange": one({"question": "q", "answers": [{"text": "x", "pm_score": 3},
                                                       {"text": "y", "pm_score": 0}]}, "q",
                         {"x": 3, "y": 0}, "stack_exchange"),
    "GPT-4-LLM": one({"user_input": "q", "responses_and_scores": [
        {"response": "x", "source": "gpt4", "score": 8.0}, {"response": "y", "score": 3.5}]}, "q",
        {"x": 8, "y": 3.5}, "gpt4_llm"),
    "objects that are texts": Case([{"question": "q", "answers": ["x", "y"]}],
                                   "answers[0] is 'x' (str), expected an object", ""),
    # pairs
    "pair": one({"prompt": "q", "chosen": "x", "rejected": "y"}, "q", {"x": 1, "y": 0},
                "preference"),
    "pair, several rejected": one({"prompt": "q", "chosen": "x", "rejected": ["y", "z"]}, "q",
                                  {"x": 1, "y": 0, "z": 0}, "preference"),
    "pair, several of both": one({"question": "q", "chosen": ["x", "w"], "rejected": ["y", "z"]},
                                 "q", {"x": 1, "w": 1, "y": 0, "z": 0}, "preference"),
    "chat pair": one({"chosen": [*BACK, said("x")], "rejected": [*BACK, said("y")]}, BACK,
                     {"x": 1, "y": 0}, "preference"),
    "chat pair as structs": one(
        {"chosen": {"role": ["user", "assistant"], "content": ["hi", "x"]},
         "rejected": {"role": ["user", "assistant"], "content": ["hi", "y"]}}, HI,
        {"x": 1, "y": 0}, "preference"),
    "prompt as a struct": one(
        {"prompt": {"role": ["user"], "content": ["hi"]}, "chosen": "x", "rejected": "y"}, HI,
        {"x": 1, "y": 0}, "preference"),
    "ShareGPT pair": one({"conversations": [human("hi")], "chosen": gpt("x"), "rejected": gpt("y")},
                         HI, {"x": 1, "y": 0}, "preference"),
    "ShareGPT conversations": one(
        {"chosen": [human("hi"), gpt("x")], "rejected": [human("hi"), gpt("y")]}, HI,
        {"x": 1, "y": 0}, "preference"),
    "ShareGPT in a prompt": one(
        {"prompt": [{"from": "system", "value": "s"}, human("hi")], "responses": ["x", gpt("y")],
         "scores": [1, 2]}, [{"role": "system", "content": "s"}, *HI], {"x": 1, "y": 2},
        "canonical"),
    "ShareGPT, mapped": one(
        {"conversations": [human("hi")], "responses": ["x", "y"], "scores": [1, 2]}, HI,
        {"x": 1, "y": 2}, "canonical", options={"columns": "prompt=conversations"}),
    "one odd conversation": Case(
        [{"chosen": [*BACK, said("x")], "rejected": [*HI, said("y")]},
         {"chosen": [*HI, said("x")], "rejected": [*HI, said("y")]}],
        [(HI, {"hello\n\nx": 1, "y": 0}), (HI, {"x": 1, "y": 0})], "preference"),
    "HH": one({"chosen": HH + " x", "rejected": HH + " y"}, HH, {" x": 1, " y": 0}, "preference"),
    "HH, a response that says Assistant": one(
        {"chosen": HH + " I, Assistant: x", "rejected": HH + " I, Assistant: y"}, HH,
        {" I, Assistant: x": 1, " I, Assistant: y": 0}, "preference"),
    "HH, a response that opens a turn": one(
        {"chosen": HH + " z\n\nAssistant: x", "rejected": HH + " z\n\nAssistant: y"}, HH,
        {" z\n\nAssistant: x": 1, " z\n\nAssistant: y": 0}, "preference"),
    "HH, several turns": one(
        {"chosen": HH + " a" + HH + " x", "rejected": HH + " a" + HH + " y"}, HH + " a" + HH,
        {" x": 1, " y": 0}, "preference"),
    "HH, parted early": Case(
        [{"chosen": HH + " a" + HH + " x", "rejected": HH + " b"},
         {"chosen": HH + " x", "rejected": HH + " y"}],
        [(HH, {" x": 1, " y": 0})], "preference", dropped={PARTED_EARLY: [1]}),
    "explicit prompt, a response that says Assistant": one(
        {"prompt": "q", "chosen": "Assistant: x", "rejected": "Assistant: y"}, "q",
        {"Assistant: x": 1, "Assistant: y": 0}, "preference"),
    "StackExchange pair": one({"question": "q", "response_j": "x", "response_k": "y"}, "q",
                              {"x": 1, "y": 0}, "stack_pairs"),
    "GPT-4-LLM pair": one({"user_input": "q", "completion_a": "x", "completion_b": "y"}, "q",
                          {"x": 1, "y": 0}, "gpt4_llm_pairs"),
    # verdicts
    "A wins": one(AB | {"winner": "A"}, "q", {"x": 1, "y": 0}, "ab"),
    "B wins": one(AB | {"winner": "model_b"}, "q", {"x": 0, "y": 1}, "ab"),
    "a tie": one(AB | {"winner": "tie"}, "q", {"x": 0, "y": 0}, "ab"),
    "both bad": one(AB | {"winner": "tie (bothbad)"}, "q", {"x": 0, "y": 0}, "ab"),
    "flags": one(AB | {"winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0}, "q",
                 {"x": 0, "y": 1}, "ab"),
    "margin": one(AB | {"margin": -1.5}, "q", {"x": 0, "y": 1.5}, "ab"),
    "margin of none": one(AB | {"margin": 0}, "q", {"x": 0, "y": 0}, "ab"),
    "scores of both": one(AB | {"score_a": 3, "score_b": 4}, "q", {"x": 3, "y": 4}, "ab"),
    "mapped verdict": one({"q": "q", "1": "x", "2": "y", "best": "b"}, "q", {"x": 0, "y": 1}, "ab",
                          options={"columns": "prompt=q,response_a=1,response_b=2,winner=best"}),
    "mapped margin": one(AB | {"gap": 2}, "q", {"x": 2, "y": 0}, "ab",
                         options={"columns": "margin=gap"}),
    "no verdict": Case([AB], "no verdict; expected one of winner, winner_model_a, margin", ""),
    "an odd winner": Case([AB | {"winner": "C"}], "winner is 'C' (str), expected one of a, m", ""),
    "a list of winners": Case([AB | {"winner": ["a"]}], "winner is ['a'] (list), expected", ""),
    "a row without a verdict": Case(
        [AB | {"winner": None}, AB | {"winner": "a"}], [("q", {"x": 1, "y": 0})], "ab",
        dropped={"fewer than 2 candidates": [1]}),
    "no prompt": Case([AB | {"prompt": None, "winner": "a"}, AB | {"winner": "a"}],
                      [("q", {"x": 1, "y": 0})], "ab", dropped={NO_PROMPT: [1]}),
    "arena": one({"conversation_a": [*HI, said("x")], "conversation_b": [*HI, said("y")],
                  "winner": "model_b"}, HI, {"x": 0, "y": 1}, "arena"),
    "HelpSteer2, first": one(STEER2 | {"preference_strength": -2}, "q", {"x": 2, "y": 0},
                             "helpsteer2"),
    "HelpSteer2, second": one(STEER2 | {"preference_strength": 1}, "q", {"x": 0, "y": 1},
                              "helpsteer2"),
    "HelpSteer3": one(STEER3, BACK, {"x": 2, "y": 0}, "helpsteer3"),
    "PKU": one(PKU, "q", {"x": 0, "y": 1}, "safe_rlhf"),
    "PKU, the safer": one(PKU | {"safer_response_id": 0}, "q", {"x": 1, "y": 0}, "safe_rlhf",
                          options={"columns": "better_response_id=safer_response_id"}),
    "PKU, no response": Case([PKU | {"better_response_id": 2}], "is 2 (int), expected one of 0, 1",
                             ""),
    "SHP, A": one(SHP | {"labels": 1}, "q", {"x": 1, "y": 0}, "shp"),
    "SHP, B": one(SHP | {"labels": 0}, "q", {"x": 0, "y": 1}, "shp"),
    "WebGPT": one(WEB, "q", {"x": -1, "y": 1}, "webgpt"),
    "TL;DR": one(TLDR, POSTED, {" x": 0, " y": 1}, "tldr"),
    "TL;DR of an article": one(TLDR | {"info": {"article": "News."}}, "News.\n\nTL;DR:",
                               {" x": 0, " y": 1}, "tldr"),
    "TL;DR, no summary": Case([TLDR | {"choice": 2}], "choice is 2 (int), expected a position", ""),
    # one response per row
    "flat": Case([{"prompt": "q", "response": "x", "score": 1},
                  {"prompt": "q", "response": "y", "score": 2}], [("q", {"x": 1, "y": 2})], "flat"),
    "flat, ends": Case([{"prompt": "q", "response": "x", "score": 1, "ended": "length"},
                        {"prompt": "q", "response": "y", "score": 2}],
                       [("q", {"x": 1, "y": 2})], "flat"),
    "HelpSteer": Case([STEER, STEER | {"response": "y", "helpfulness": 2}],
                      [("q", {"x": 4, "y": 2})], "flat"),
    "HelpSteer, weighted": Case(
        [STEER, STEER | {"response": "y", "helpfulness": 2, "safety": 5}],
        [("q", {"x": 3.25, "y": 2.75})], "flat",
        options={"score_key": '{"helpfulness": 0.75, "safety": 0.25}'}),
    "KTO": Case([{"prompt": "q", "completion": "x", "label": True},
                 {"prompt": "q", "completion": "y", "label": False},
                 {"prompt": "q", "completion": "z", "label": None}],
                [("q", {"x": 1, "y": 0})], "completions"),
    "completions with scores": Case([{"prompt": "q", "completion": "x", "score": 3},
                                     {"prompt": "q", "completion": [said("y")], "score": 4}],
                                    [("q", {"x": 3, "y": 4})], "completions"),
    "a label in words": Case([{"prompt": "q", "completion": "x", "label": "good"}],
                             "label is 'good' (str), expected a number", ""),
    # trees
    "OASST trees": Case([{"message_tree_id": "t", "prompt": TREE}], TREE_RECORDS, "oasst_trees"),
    "OASST messages": Case(messages(TREE), TREE_RECORDS, "oasst"),
    "OASST, orphans": Case([*messages(TREE), messages(TREE["replies"][0], "lost")[0]],
                           TREE_RECORDS, "oasst", dropped={NO_PROMPT: [7]}),
    "a tree of a text": Case([{"message_tree_id": "t", "prompt": "q"}],
                             "a message is 'q' (str), expected an object", ""),
    # score_key
    "weights that are none": Case([{"prompt": "q", "responses": ["x"]}],
                                  "score_key must be a field", "",
                                  options={"score_key": '{"a": "b"}'}),
    "a weight without its field": Case(
        [STEER, STEER | {"response": "y"}], "no usable record", "",
        options={"score_key": '{"helpfulness": 1, "absent": 1}'}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_table(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in case.rows), encoding="utf-8")
    report = Report()
    if isinstance(case.expected, str):
        with pytest.raises(InputError) as error:
            list(read_records(path, **case.options))
        assert case.expected in str(error.value) and "\n" not in str(error.value)
        return
    found = list(read_records(path, report=report, **case.options))
    assert [(r.prompt, dict(zip(r.responses, r.scores, strict=True))) for r in found] == [
        (prompt, pytest.approx(scores)) for prompt, scores in case.expected
    ]
    assert (report.format, report.dropped) == (case.format, case.dropped)
    if "score_key" in case.options or NO_SCORE in report.dropped_candidates:
        return
    items = [item for item in read_items(path, **case.options) if item.prompt is not None]
    assert [(item.prompt, item.responses) for item in items if len(item.responses) > 1][
        -len(found) :
    ] == [(r.prompt, list(r.turns or r.responses)) for r in found]


def test_every_format_is_in_the_table_and_in_the_help() -> None:
    assert {case.format for case in CASES.values()} - {""} == set(FORMATS)
    said = InspectOptions.__dataclass_fields__["format"].metadata["help"]
    assert all(name in said for name in FORMATS)


def test_what_is_left_out_of_a_workflow_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in CASES["HH, parted early"].rows))
    with caplog.at_level(logging.WARNING):
        assert len(list(read_items(path))) == len(list(read_items(path))) == 1
    assert [r.getMessage() for r in caplog.records] == [f"{path}, line 1: left out: {PARTED_EARLY}"]


# ---- kinds of files ---------------------------------------------------------------------------

ROWS = [{"prompt": f"é\u2028{i}", "chosen": "x", "rejected": "y"} for i in range(3)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
TABLE = "prompt,chosen,rejected\n" + "".join(f"é\u2028{i},x,y\n" for i in range(3))


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_marked_encodings(encoding: str, cached: bool, tmp_path: Path) -> None:
    for name, text in (
        ("a.jsonl", LINES), ("b.json", json.dumps(ROWS, ensure_ascii=False)), ("c.csv", TABLE),
    ):  # fmt: skip
        path = tmp_path / name
        path.write_bytes(text.encode(encoding))
        assert [r.prompt for r in read_records(path)] == [row["prompt"] for row in ROWS]
    options = {"cache_dir": tmp_path / "cache", "num_proc": 2} if cached else {}
    groups, _ = load_groups(tmp_path / "a.jsonl", make_tokenizer(), **options)
    assert [group.name for group in groups] == [f"{tmp_path / 'a.jsonl'}:{n}" for n in (1, 2, 3)]


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_texts_of_a_table_that_look_like_numbers_are_texts(suffix: str, tmp_path: Path) -> None:
    sep = "," if suffix == ".csv" else "\t"
    path = tmp_path / f"a{suffix}"
    rows = [["question", "response_a", "response_b", "winner"], ["007", "1.50", "nan", "a"]]
    path.write_text("".join(sep.join(row) + "\n" for row in rows))
    [record] = read_records(path, columns="prompt=question")
    assert (record.prompt, record.responses, record.scores) == ("007", ["1.50", "nan"], [1, 0])
    rows = [["prompt", "completion", "label"], ["q", "1", "True"], ["q", "02", "False"]]
    path.write_text("".join(sep.join(row) + "\n" for row in rows))
    [record] = read_records(path)
    assert (record.responses, record.scores) == (["1", "02"], [1, 0])


def test_patterns(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"part-{i}.jsonl").write_text(LINES.replace("é", f"{i}"), encoding="utf-8")
        (tmp_path / f"zipped-{i}.jsonl.gz").write_bytes(gzip.compress(LINES.encode()))
    found = [r.prompt for r in read_records(tmp_path / "part-*.jsonl")]
    assert found == [f"{i}\u2028{k}" for i in range(3) for k in range(3)]
    assert len(list(read_records(tmp_path / "zipped-[01].jsonl.gz"))) == 6
    assert len(list(read_records(tmp_path / "part-1*"))) == 3
    pattern = str(tmp_path / "part-*.jsonl")
    before = file_identity(pattern)
    assert before == file_identity(pattern) != file_identity(str(tmp_path / "part-[01].jsonl"))
    (tmp_path / "part-2.jsonl").write_text(LINES, encoding="utf-8")
    assert file_identity(pattern) != before
    (tmp_path / "part-folder.jsonl").mkdir()  # no file
    assert len(list(read_records(tmp_path / "part-*.jsonl"))) == 9
    with pytest.raises(InputError, match="no file matches"):
        list(read_records(tmp_path / "*.parquet"))
    (tmp_path / "part-3.csv").write_text(TABLE, encoding="utf-8")
    with pytest.raises(InputError, match=r"several kinds: \.csv, \.jsonl"):
        list(read_records(tmp_path / "part-*"))


def test_what_a_file_needs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    monkeypatch.setattr(fsspec, "available_compressions", lambda: [None, "gzip"])
    (tmp_path / "a.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    with pytest.raises(InputError, match="pip install zstandard"):
        list(read_records(tmp_path / "a.jsonl.zst"))
