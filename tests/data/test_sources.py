"""Every kind of source gives the same rows, in pieces or whole."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from record_files import byte_tokenizer, some_rows, write_jsonl

from fastrank.data.files import open_source
from fastrank.data.load import load_groups
from fastrank.data.records import read_records
from fastrank.data.rows import parse_row
from fastrank.errors import InputError

FLAT = [
    {"prompt": p, "response": r, "score": s}
    for p in ("1", "é\n")
    for r, s in (("NA", 1), ("b", 0.5))
]


def parsed(source: Any, count: int = 1) -> list[tuple[str, dict[str, Any]]]:
    pieces = open_source(source).pieces(count)
    assert len(pieces) <= count
    return [(str(p), parse_row(p, raw)) for p, raw in chain.from_iterable(pieces)]


@pytest.mark.parametrize("count", [2, 3, 7, 40])
def test_pieces_of_json_lines_are_the_lines(count: int, tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    rows = [json.dumps({"a": "x" * (k * k % 50)}) for k in range(30)]
    for text in (
        "\n".join(rows),
        "\ufeff\n\r\n" + "\r\n".join(rows) + "\n\n",
        "\n" * 200 + rows[1],
        rows[7] + "\n" + "\n" * 200,
        rows[7],
    ):
        path.write_text(text, encoding="utf-8", newline="")
        expected = parsed(path)
        assert parsed(path, count) == expected and len(expected) in (1, 30)
        places = [int(place.rsplit(" ", 1)[1]) for place, _ in expected]
        lines = text.split("\n")
        assert all(
            json.loads(lines[k - 1]) == row
            for k, (_, row) in zip(places, expected, strict=True)
            if k > 1
        )


def _parquet(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "d.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=4)
    return path


def _document(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "d.json"
    path.write_text(json.dumps({"data": rows}))
    return path


def _compressed_document(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "d.json.gz"
    path.write_bytes(gzip.compress(json.dumps(rows).encode()))
    return path


def _saved(folder: Path, rows: list[dict[str, Any]]) -> Path:
    datasets.Dataset.from_list(rows).save_to_disk(str(folder / "saved"))
    return folder / "saved"


def _saved_splits(folder: Path, rows: list[dict[str, Any]]) -> str:
    splits = {
        "train": datasets.Dataset.from_list(rows[:2]),
        "held": datasets.Dataset.from_list(rows),
    }
    datasets.DatasetDict(splits).save_to_disk(str(folder / "splits"))
    return f"{folder / 'splits'}:held"


def _dataset(folder: Path, rows: list[dict[str, Any]]) -> datasets.Dataset:
    return datasets.Dataset.from_list(rows)


@pytest.mark.parametrize(
    "make", [_parquet, _document, _compressed_document, _saved, _saved_splits, _dataset]
)
def test_pieces_of_other_kinds(make: Callable[..., Any], tmp_path: Path) -> None:
    rows = [{"a": k, "b": ["x"] * (k % 3)} for k in range(17)]
    source = make(tmp_path, rows)
    whole = parsed(source)
    assert [row for _, row in whole] == rows
    assert [place.rsplit(", ", 1)[1] for place, _ in whole] == [f"record {k}" for k in range(1, 18)]
    for count in (2, 5, 40):
        assert parsed(source, count) == whole


@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz"])
def test_compressed_json_lines_keep_their_line_numbers(suffix: str, tmp_path: Path) -> None:
    compress = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}[suffix]
    plain = write_jsonl(tmp_path / "d.jsonl", some_rows(40))
    path = tmp_path / f"d.jsonl.{suffix}"
    path.write_bytes(compress(b"\n" + plain.read_bytes()))
    lines = [record.line for record in read_records(plain)]
    assert [record.line for record in read_records(path)] == [line + 1 for line in lines]
    groups, _ = load_groups(path, byte_tokenizer(), num_proc=2, cache_dir=tmp_path / "cache")
    assert [group.name for group in groups] == [f"{path}:{line + 1}" for line in lines]
    path.write_bytes(compress(b'{"prompt": 3, "responses": [], "scores": []}'))
    with pytest.raises(InputError, match="line 1: prompt is 3"):
        list(read_records(path))
    raw = compress(plain.read_bytes())
    for damaged in (
        raw[: len(raw) // 2],
        b"nothing of the kind",
        raw[:9] + b"\xff" * 40 + raw[49:],
    ):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=f"d.jsonl.{suffix}: cannot be read: ") as caught:
            list(read_records(path))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "separator"), [("d.csv", ","), ("d.tsv", "\t"), ("d.csv.gz", ",")]
)
def test_separated_values(name: str, separator: str, tmp_path: Path) -> None:
    path = tmp_path / name
    opened = gzip.open(path, "wt") if name.endswith("gz") else path.open("w")
    with opened as file:
        writer = csv.DictWriter(file, FLAT[0], delimiter=separator)
        writer.writeheader()
        writer.writerows(FLAT)
    records = list(read_records(path))
    assert [(r.prompt, r.responses, r.scores) for r in records] == [
        (prompt, ["NA", "b"], [1.0, 0.5]) for prompt in ("1", "é\n")
    ]
    path.write_bytes(b"\xff\x00" * 40)
    with pytest.raises(
        InputError, match=rf"{name}: (cannot be loaded as a data set: |.*no known)"
    ) as caught:
        list(read_records(path))
    assert "\n" not in str(caught.value)


def test_objects_are_sources(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "responses": ["a", "b"], "scores": [1.0, k]} for k in (0.0, 2.0, 5.0)]
    dataset = datasets.Dataset.from_list(rows)
    sources = [rows, iter(rows), dataset, dataset.to_iterable_dataset()]
    for source in sources:
        groups, report = load_groups(source, byte_tokenizer())
        assert [g.rewards.tolist() for g in groups] == [[1.0, k] for k in (0.0, 2.0, 5.0)]
        assert report.name == "data set" and groups[0].name == "data set:1"
    root = tmp_path / "cache"
    for _ in range(2):
        cached, _ = load_groups(dataset, byte_tokenizer(), cache_dir=root, num_proc=2)
        assert [g.rewards.tolist() for g in cached] == [[1.0, k] for k in (0.0, 2.0, 5.0)]
    assert len([entry for entry in root.iterdir() if entry.is_dir()]) == 1
    with pytest.raises(InputError, match="rows of an iterable .* not cached"):
        load_groups(rows, byte_tokenizer(), cache=True)
    for wrong, expected in (
        (datasets.DatasetDict(train=dataset), "one split of a data set, got a dictionary of train"),
        (3, "expected a path or rows, got int"),
        ([3], "data set, record 1: expected a JSON object, got int"),
    ):
        with pytest.raises(InputError, match=expected):
            load_groups(wrong, byte_tokenizer())
