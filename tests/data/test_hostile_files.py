"""Mutated files give records, counted drops or one line, never another exception."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hostile import ROWS, mutate, read
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastrank.data.formats import FORMATS


@pytest.mark.parametrize("seed", range(4))
def test_mutated_json(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    usable = 0
    for number in range(250):
        row = ROWS[number % len(ROWS)]
        lines = "\n".join(json.dumps(row, ensure_ascii=False) for _ in range(3))
        text = lines if number % 3 else json.dumps([row] * 3)
        path = tmp_path / ("m.json" if number % 2 else "m.jsonl")
        path.write_bytes(mutate(text.encode(), chance))
        usable += read(path).kept > 0
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
    read(path)


def test_any_bytes(tmp_path: Path) -> None:
    chance = random.Random(0)
    for _ in range(200):
        path = tmp_path / chance.choice(["x.jsonl", "x.json", "x.txt", "x"])
        path.write_bytes(bytes(chance.randrange(256) for _ in range(chance.randrange(60))))
        read(path)
