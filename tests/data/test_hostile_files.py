"""Mutated files give records, counted drops or one line, never another exception."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastrank.data.formats import FORMATS
from fastrank.data.records import read_records
from fastrank.data.report import Report
from fastrank.errors import InputError

ROWS = [
    {"prompt": "p é", "responses": ["a", "b", "c"], "scores": [1, 0.5, -2]},
    {"prompt": [{"role": "user", "content": "q"}], "responses": ["a", "b"], "ranks": [0, 1]},
    {"query": "q", "responses": ["a", "b"], "scores": [1, 0]},
    {"prefix": [["<|prompter|>q", "<|assistant|>"]] * 2, "suffix": ["a", "b"], "reward": [1, 0]},
    {"instruction": "q", "completions": [{"response": r, "overall_score": 1} for r in "ab"]},
    {"prompt": "q", "answers": [{"answer": r, "rank": 1} for r in "ab"]},
    {"prompt": "q", "all_generated_responses": ["a", "b"], "all_rm_scores": [0.1, 0.2]},
    {"prompt": "q", "chosen": [{"role": "user", "content": "q"}, {"role": "a", "content": "x"}],
     "rejected": [{"role": "user", "content": "q"}, {"role": "a", "content": "y"}]},
    {"chosen": "Human: q Assistant: a", "rejected": "Human: q Assistant: b"},
    {"prompt": "q", "response": "a", "score": 3},
]  # fmt: skip


def _read(path: Path) -> Report:
    """Read a file to its end; the report must add up, whatever the file holds."""
    report = Report()
    records = []
    try:
        records = list(read_records(path, report=report))
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 600
    else:
        assert report.kept == len(records) > 0
        assert report.candidates_kept == sum(len(r.responses) for r in records)
        assert sum(n * k for n, k in report.candidates_per_group.items()) == report.candidates_kept
    for record in records:
        assert len(record.responses) == len(record.scores) >= 2
        assert all(r.strip() for r in record.responses) and record.line >= 1
        json.dumps(record.scores, allow_nan=False)
    json.dumps(report.as_dict(), allow_nan=False)
    report.as_text()
    return report


def _mutate(raw: bytes, chance: random.Random) -> bytes:
    data = bytearray(raw)
    for _ in range(chance.randint(1, 6)):
        at = chance.randrange(len(data)) if data else 0
        kind = chance.randrange(4)
        if kind == 0:
            data[at : at + 1] = bytes([chance.randrange(256)])
        elif kind == 1:
            data[at : at + chance.randint(1, 20)] = b""
        elif kind == 2:
            data[at:at] = chance.choice(
                [b"null", b"{", b"]", b'"', b"\n", b"NaN", b"-1e999", b"[[", b"\x00", b"\\ud800"]
            )
        else:
            data[at:at] = data[at : at + chance.randint(1, 40)]
    return bytes(data)


@pytest.mark.parametrize("seed", range(4))
def test_mutated_json(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    usable = 0
    for number in range(250):
        row = ROWS[number % len(ROWS)]
        lines = "\n".join(json.dumps(row, ensure_ascii=False) for _ in range(3))
        text = lines if number % 3 else json.dumps([row] * 3)
        path = tmp_path / ("m.json" if number % 2 else "m.jsonl")
        path.write_bytes(_mutate(text.encode(), chance))
        usable += _read(path).kept > 0
    assert 20 < usable < 230  # the mutations are neither harmless nor always fatal


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "text", "response"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)
KEYS = sorted(
    {key for row in ROWS for key in row} | {k for f in FORMATS.values() for k in f.fields}
)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rows=st.lists(
        st.tuples(st.sampled_from(ROWS), st.dictionaries(st.sampled_from(KEYS), JSON, max_size=2)),
        min_size=1,
        max_size=3,
    )
)
def test_any_json_in_any_field(rows: list[tuple[dict, dict]], tmp_path: Path) -> None:
    path = tmp_path / "any.jsonl"
    path.write_text("\n".join(json.dumps(row | changed) for row, changed in rows))
    _read(path)


def test_any_bytes(tmp_path: Path) -> None:
    chance = random.Random(0)
    for _ in range(200):
        path = tmp_path / chance.choice(["x.jsonl", "x.json", "x.txt", "x"])
        path.write_bytes(bytes(chance.randrange(256) for _ in range(chance.randrange(60))))
        _read(path)
