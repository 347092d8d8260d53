"""Parquet is read in a limited process: what crashes, hangs or bloats it is one line here."""

from __future__ import annotations

import datetime
import decimal
import json
import random
from pathlib import Path
from typing import Any

import psutil
import pyarrow
import pyarrow.parquet
import pytest

from fastrank.data import parquet
from fastrank.data.files import read_rows
from fastrank.data.records import read_records
from fastrank.errors import InputError


def _write(path: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
    return path


def test_rows_come_back_in_order_from_every_row_group(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"p {i} é\u2028\n", "responses": ["a", None], "scores": [i / 3, None], "id": i}
        for i in range(1000)
    ]
    path = _write(tmp_path / "rows.parquet", rows, row_group_size=300)
    found = list(read_rows(path))
    assert [row for _, row in found] == rows
    assert [place.line for place, _ in found] == list(range(1, 1001))
    assert str(found[6][0]) == f"{path}, record 7"


def test_values_that_json_lacks(tmp_path: Path) -> None:
    row = {
        "text": "é".encode(),
        "picture": b"\xff\xd8",
        "decimal": decimal.Decimal("1.25"),
        "day": datetime.date(2024, 2, 3),
        "nan": float("nan"),
    }
    ((_, found),) = read_rows(_write(tmp_path / "odd.parquet", [row]))
    assert found["nan"] != found.pop("nan")
    assert found == {
        "text": "é",
        "picture": {"bytes": 2},
        "decimal": 1.25,
        "day": "2024-02-03",
    }


def test_a_record_that_is_wrong_is_named(tmp_path: Path) -> None:
    good = {"prompt": "p", "responses": ["a", "b"], "scores": [1.0, 0.0]}
    bad = good | {"scores": [1.0, float("inf")]}
    path = _write(tmp_path / "bad.parquet", [good] * 300 + [bad])
    with pytest.raises(InputError, match=r"record 301: scores\[1\] is inf"):
        list(read_records(path))


def _instead(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str) -> Path:
    """Run ``code`` in place of the process that reads the file."""
    script = tmp_path / "child.py"
    script.write_text(f"import json, sys\nsys.path[:] = json.loads(sys.argv[6])\n{code}\n")
    monkeypatch.setattr(parquet, "PROGRAM", str(script))
    return _write(tmp_path / "any.parquet", [{"a": 1}])


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", r"crashed .* \(SIGSEGV\)"),
        ("import os; os.abort()", r"crashed .* \(SIGABRT\)"),
        ("sys.exit(7)", "failed with status 7"),
        ("print('first\\nsecond', file=sys.stderr); sys.exit(3)", "file: second$"),
        (
            "from fastrank.data.parquet import limit_time\nlimit_time(0)\nwhile True: pass",
            "more than 30 s of processor time for a batch of rows",
        ),
        ("print('1\\n{}'); sys.stdout.flush(); import os; os.abort()", "crashed"),
    ],
)
def test_a_reader_that_dies_is_one_line(
    code: str, expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = _instead(monkeypatch, tmp_path, code)
    with pytest.raises(InputError, match=expected) as caught:
        list(read_rows(path))
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_a_small_file_that_unfolds_to_gigabytes_is_refused(tmp_path: Path) -> None:
    """One text of 8 MiB, stored once and named by 4096 rows: 2 GiB a batch once unfolded."""
    rows = pyarrow.DictionaryArray.from_arrays(
        pyarrow.array([0] * 4096, pyarrow.int32()), pyarrow.array(["x" * (8 << 20)])
    )
    path = tmp_path / "bomb.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": rows}), path, compression="zstd")
    assert path.stat().st_size < 1 << 20
    with pytest.raises(InputError, match="needs more than 384 MiB for a batch"):
        list(read_rows(path))


def test_a_reader_that_is_no_longer_wanted_ends(tmp_path: Path) -> None:
    path = _write(tmp_path / "long.parquet", [{"text": "y" * 1000}] * 20_000)
    rows = read_rows(path)
    next(rows)
    (child,) = [p for p in psutil.Process().children() if str(path) in p.cmdline()]
    rows.close()  # type: ignore[attr-defined]
    assert not child.is_running()


def test_damaged_files(tmp_path: Path) -> None:
    row = {"prompt": "p", "responses": ["a", "b"], "scores": [1.0, 0.0]}
    whole = _write(tmp_path / "whole.parquet", [row] * 50).read_bytes()
    chance = random.Random(0)
    refused = 0
    for number in range(9):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 8)):
            data[chance.randrange(4, len(data))] = chance.randrange(256)
        path = tmp_path / f"{number}.parquet"
        path.write_bytes(bytes(data) if number % 3 else whole[: chance.randrange(len(whole))])
        try:
            records = list(read_records(path))
        except InputError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 600
        else:
            json.dumps([record.scores for record in records], allow_nan=False)
    assert refused >= 5
