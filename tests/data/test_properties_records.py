"""Records of any content come back as they were, and nothing goes uncounted."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from record_files import byte_tokenizer

from fastrank.data.files import open_source
from fastrank.data.records import Reading, open_records, read_records, spread, standardized
from fastrank.data.report import Report
from fastrank.data.rows import Place
from fastrank.data.tokenize import TokenizeOptions, as_group, encode_rows
from fastrank.errors import InputError

quick = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))

words = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
said = words.filter(str.strip)
number = st.floats(-1e6, 1e6) | st.integers(-1000, 1000)
messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": words}),
    min_size=1,
    max_size=3,
)


@st.composite
def rows(draw: Any, prompts: Any = words | messages, useless: bool = False) -> list[dict]:
    """Canonical rows; ``useless`` adds candidates and records that have to be dropped."""
    out = []
    for _ in range(draw(st.integers(1, 6))):
        n = draw(st.integers(0 if useless else 2, 5))
        one = said | st.sampled_from([None, "", " \n"]) if useless else said
        score = number | st.none() if useless else number
        out.append(
            {
                "prompt": draw(prompts | st.none() if useless else prompts),
                "responses": draw(st.lists(one, min_size=n, max_size=n)),
                "scores": draw(st.lists(score, min_size=n, max_size=n)),
            }
        )
    return out


def write(folder: str, kind: str, content: list[dict]) -> Path:
    path = Path(folder) / f"data.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), path)
    elif kind == "json":
        path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    else:
        lines = (json.dumps(row, ensure_ascii=len(content) % 2 == 0) for row in content)
        path.write_text("\n".join(lines), encoding="utf-8")
    return path


def check_round_trip(content: list[dict], kind: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        records = list(read_records(write(folder, kind, content)))
    assert [r.line for r in records] == list(range(1, len(content) + 1))
    for record, row in zip(records, content, strict=True):
        assert (record.prompt, record.responses) == (row["prompt"], row["responses"])
        assert record.scores == [float(score) for score in row["scores"]]


@quick
@given(content=rows(), kind=st.sampled_from(["jsonl", "json"]))
def test_records_come_back(content: list[dict], kind: str) -> None:
    check_round_trip(content, kind)


@settings(quick, max_examples=8)
@given(content=rows(prompts=words))
def test_records_come_back_from_parquet(content: list[dict]) -> None:
    for row in content:  # a column has one type
        row["scores"] = [float(score) for score in row["scores"]]
    check_round_trip(content, "parquet")


def usable(row: dict) -> list[tuple[str, float]]:
    pairs = zip(row["responses"], row["scores"], strict=True)
    kept = [(r, float(s)) for r, s in pairs if r is not None and r.strip() and s is not None]
    return kept if row["prompt"] is not None and len(kept) >= 2 else []


@quick
@given(content=rows(useless=True))
def test_what_is_dropped_is_what_is_of_no_use(content: list[dict]) -> None:
    expected = [(line, usable(row)) for line, row in enumerate(content, start=1) if usable(row)]
    report = Report()
    with tempfile.TemporaryDirectory() as folder:
        try:
            records = list(read_records(write(folder, "jsonl", content), report=report))
        except InputError as error:
            assert not expected and "no usable record" in str(error)
            records = []
    found = [(r.line, list(zip(r.responses, r.scores, strict=True))) for r in records]
    assert found == expected
    assert report.read == len(content) == report.kept + sum(map(len, report.dropped.values()))
    assert report.kept == len(expected)
    assert report.candidates_read == sum(len(row["responses"]) for row in content)
    assert report.candidates_kept == sum(len(kept) for _, kept in expected)
    rewards = [score for _, kept in expected for _, score in kept]
    assert report.reward_min == min(rewards, default=None)
    assert report.reward_max == max(rewards, default=None)


@quick
@given(content=rows(useless=True), cut=st.integers(0, 6))
def test_reports_of_two_parts_are_the_report(content: list[dict], cut: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source = open_source(write(folder, "jsonl", content))
        (rows,), reader = open_records(source, Reading(), Report())
        whole, parts = Report(), (Report(), Report())
        for at, (place, row) in enumerate(rows):
            reader.read(place, row, whole)
            reader.read(place, row, parts[at >= cut])
    parts[0].merge(parts[1])
    assert parts[0] == whole
    assert Report.from_state(json.loads(json.dumps(whole.state()))) == whole
    assert parts[0].as_text() == whole.as_text() and parts[0].as_dict() == whole.as_dict()


@quick
@given(
    content=rows(prompts=said),
    prompt_limit=st.none() | st.integers(1, 20),
    response_limit=st.none() | st.integers(1, 20),
    limit=st.none() | st.integers(2, 30),
)
def test_tokens_say_the_texts_and_keep_the_limits(
    content: list[dict], prompt_limit: int | None, response_limit: int | None, limit: int | None
) -> None:
    """Bytes as tokens, so that the tokens of prompt and response are their texts' own bytes."""
    options = TokenizeOptions(prompt_limit, response_limit, limit)
    report = Report(name="f")
    with tempfile.TemporaryDirectory() as folder:
        source = open_source(write(folder, "jsonl", content))
        (found,), reader = open_records(source, Reading(), report)
        tokenized = encode_rows(found, reader, byte_tokenizer(), options, report)
        groups = [as_group(record, encoded, "f") for record, encoded in tokenized]
    assert len(groups) == len(content) == report.kept
    tokenizer = byte_tokenizer()
    cut_prompts = cut_responses = 0
    for group, row in zip(groups, content, strict=True):
        prompt = [0, *tokenizer(row["prompt"], add_special_tokens=False).input_ids]
        if prompt_limit is not None or limit is not None:
            own = group.prompt_ids.tolist()
            assert own[-1] == prompt[-1] and len(own) <= len(prompt)
            assert len(own) == 1 or own[0] == 0  # a leading BOS stays
            cut_prompts += len(own) < len(prompt)
        else:
            assert group.prompt_ids.tolist() == prompt
        for ids, text in zip(group.response_ids, row["responses"], strict=True):
            whole = [*tokenizer(text, add_special_tokens=False).input_ids, 1]
            assert ids.tolist() == whole[: len(ids)]
            cut_responses += len(ids) < len(whole)
            assert response_limit is None or len(ids) <= response_limit
            assert limit is None or len(group.prompt_ids) + len(ids) <= limit
        assert prompt_limit is None or len(group.prompt_ids) <= prompt_limit
    assert len(report.truncated.get("prompt", [])) == cut_prompts
    assert len(report.truncated.get("response", [])) == cut_responses


@quick
@given(scores=st.lists(number.map(float), min_size=2, max_size=12), data=st.data())
def test_kept_candidates_span_the_rewards(scores: list[float], data: st.DataObject) -> None:
    count = data.draw(st.integers(2, len(scores)))
    kept = spread(scores, count)
    assert len(set(kept)) == count and kept == sorted(kept)
    chosen = [scores[i] for i in kept]
    assert max(chosen) == max(scores) and min(chosen) == min(scores)


@quick
@given(scores=st.lists(st.integers(-1000, 1000).map(float), min_size=1, max_size=12))
def test_standardized_rewards_keep_their_order(scores: list[float]) -> None:
    out = standardized(scores)
    assert abs(math.fsum(out)) < 1e-9
    if len(set(scores)) > 1:
        assert abs(math.fsum(x * x for x in out) / len(out) - 1) < 1e-9
    for i, a in enumerate(scores):
        for j, b in enumerate(scores):
            assert (a < b) == (out[i] < out[j])


def test_places_are_named() -> None:
    assert str(Place("f", 3)) == "f, line 3" and str(Place("f", 3, "record")) == "f, record 3"
