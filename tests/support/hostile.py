"""Files that were damaged at random, and what reading one may do."""

from __future__ import annotations

import json
import random
from pathlib import Path

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


def read(path: Path) -> Report:
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


def mutate(raw: bytes, chance: random.Random) -> bytes:
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
