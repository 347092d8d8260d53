"""What is dropped, kept and counted; what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
from char_tokenizer import make_tokenizer

from fastrank.cli.main import main
from fastrank.data.hub import use_hub
from fastrank.data.load import load_groups
from fastrank.data.records import read_records, spread, standardized
from fastrank.data.report import Report, strict_pairs
from fastrank.errors import InputError
from fastrank.workflow.items import read_items


def _file(tmp_path: Path, *rows: dict) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _row(responses: list, scores: list | None, prompt: object = "p") -> dict:
    return {"prompt": prompt, "responses": responses, "scores": scores}


def test_every_drop_is_counted_once(tmp_path: Path) -> None:
    path = _file(
        tmp_path,
        _row(["a", "b", "c"], [1, 2, 2]),
        _row(["a", "", "  \n", None, "e"], [1, 2, 3, 4, 0.5]),
        _row(["a", "b"], [None, 1]),
        _row(["a", "b", "c"], [None, 1, 5]),
        _row(["a", "b"], [1, 2], prompt=None),
        _row(["a", "b"], None),
        _row([], []),
        _row(["a", "b"], [7, 7]),
    )
    report = Report()
    records = list(read_records(path, report=report))
    assert [r.line for r in records] == [1, 2, 4, 8]
    assert [r.positions for r in records] == [(0, 1, 2), (0, 4), (1, 2), (0, 1)]
    assert report.dropped == {"fewer than 2 candidates": [3, 6, 7], "no prompt": [5]}
    assert report.dropped_candidates == {
        "empty response": [2, 2, 2],
        "no score": [3, 4, 6, 6],
        "in a dropped record": [3, 5, 5],
    }
    assert (report.read, report.kept) == (8, 4)
    assert (report.candidates_read, report.candidates_kept) == (19, 9)
    assert report.candidates_per_group == {2: 3, 3: 1}
    assert (report.reward_min, report.reward_max) == (0.5, 7.0)
    assert (report.pairs, report.tied_pairs, report.all_tied) == (6, 2, 1)

    found = json.loads(json.dumps(report.as_dict()))
    assert found["records"]["dropped"]["fewer than 2 candidates"] == {
        "count": 3,
        "lines": [3, 6, 7],
    }
    text = report.as_text()
    assert "8 read, 4 kept" in text and "3 dropped fewer than 2 candidates (line 3, 6, 7)" in text


def test_min_candidates(tmp_path: Path) -> None:
    path = _file(tmp_path, _row(["a"], [1]), _row([], []))
    report = Report()
    assert len(list(read_records(path, min_candidates=1, report=report))) == 1
    assert report.dropped == {"fewer than 1 candidates": [2]}


@pytest.mark.parametrize(
    ("scores", "count", "kept"),
    [
        ([0.1, 0.9, 0.5, 0.7, 0.3], 2, [0, 1]),
        ([0.1, 0.9, 0.5, 0.7, 0.3], 3, [0, 1, 2]),
        ([5, 4, 3, 2, 1, 0, -1], 4, [0, 2, 4, 6]),
        ([1, 1, 1, 1], 3, [0, 2, 3]),
    ],
)
def test_spread_keeps_best_and_worst(scores: list[float], count: int, kept: list[int]) -> None:
    assert spread(scores, count) == kept


def test_spread_always_gives_as_many_as_asked() -> None:
    for n in range(2, 40):
        for count in range(2, n + 1):
            kept = spread([float((7 * i) % n) for i in range(n)], count)
            assert len(set(kept)) == count and kept == sorted(kept)
            values = [(7 * i) % n for i in kept]
            assert max(values) == max((7 * i) % n for i in range(n)) and min(values) == 0


def test_max_candidates_is_counted(tmp_path: Path) -> None:
    path = _file(tmp_path, _row(["a", "b", "c", "d"], [1, 4, 2, 3]), _row(["a", "b"], [1, 0]))
    report = Report()
    records = list(read_records(path, max_candidates=2, report=report))
    assert [r.responses for r in records] == [["a", "b"], ["a", "b"]]
    assert records[0].positions == (0, 1)
    assert report.dropped_candidates == {"beyond max_candidates": [1, 1]}
    assert report.candidates_kept == 4


def test_normalize_rewards(tmp_path: Path) -> None:
    path = _file(tmp_path, _row(["a", "b", "c"], [10, 20, 60]), _row(["a", "b"], [3, 3]))
    first, second = read_records(path, normalize_rewards="group")
    assert sum(first.scores) == pytest.approx(0)
    assert sum(s * s for s in first.scores) / 3 == pytest.approx(1)
    assert first.scores == pytest.approx([(s - 30) / (1400 / 3) ** 0.5 for s in (10, 20, 60)])
    assert second.scores == [0.0, 0.0]
    assert standardized([0.0, 5e-324])[0] == 0 < standardized([0.0, 5e-324])[1]


def test_strict_pairs() -> None:
    assert strict_pairs([1, 1, 2, 3, 3, 3]) == (11, 4)
    assert strict_pairs([1]) == (0, 0)


GOOD = {"prompt": "p", "responses": ["a", "b"], "scores": [1, 0]}

BROKEN: dict[str, tuple[object, str]] = {
    "malformed": ('{"prompt": "p", ', "line 2: malformed JSON"),
    "truncated string": ('{"prompt": "p', "line 2: malformed JSON"),
    "two values": ('{"a": 1} {"b": 2}', "line 2: malformed JSON"),
    "nested": ("[" * 100_000, "line 2: malformed JSON: nested too deeply"),
    "long number": ('{"prompt": ' + "9" * 5000 + "}", "line 2: malformed JSON"),
    "not an object": ("[1, 2]", "line 2: expected a JSON object, got list"),
    "nan": ('{"prompt": "p", "responses": ["a"], "scores": [NaN]}', "scores[0] is nan"),
    "infinite": ('{"prompt": "p", "responses": ["a"], "scores": [-Infinity]}', "finite number"),
    "beyond float32": (GOOD | {"scores": [1e39, 1]}, "line 2: scores[0] is 1e+39"),
    "huge integer": (GOOD | {"scores": [10**400, 1]}, "expected a finite number"),
    "text": (GOOD | {"scores": [1, "good"]}, "line 2: scores[1] is 'good' (str)"),
    "numeral as text": (GOOD | {"scores": ["1", "0"]}, "scores[0] is '1' (str)"),
    "boolean": (GOOD | {"scores": [True, False]}, "scores[0] is True (bool)"),
    "one score": (GOOD | {"scores": 3}, "scores is 3 (int), expected a list"),
    "too few scores": (GOOD | {"scores": [1]}, "scores has 1 entries, responses has 2"),
    "too many scores": (GOOD | {"scores": [1, 2, 3]}, "scores has 3 entries, responses has 2"),
    "responses as text": (GOOD | {"responses": "ab"}, "responses is 'ab' (str), expected a list"),
    "response as number": (GOOD | {"responses": ["a", 5]}, "responses[1] is 5 (int)"),
    "prompt as number": (GOOD | {"prompt": 3}, "prompt is 3 (int), expected text or a list"),
    "prompt of texts": (GOOD | {"prompt": ["hi"]}, "prompt[0] is 'hi' (str), expected a message"),
    "no content": (GOOD | {"prompt": [{"role": "user"}]}, "expected a message"),
    "picture": (
        GOOD | {"prompt": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
        "prompt[0].content[0] is None",
    ),
    "missing field": ({"prompt": "p", "scores": [1]}, "line 2: expected a field 'responses'"),
    "surrogate": (GOOD | {"prompt": "\ud800"}, "prompt holds a lone surrogate at character 1"),
    "not utf-8": (b'{"prompt": "\xff"}', "line 2: not UTF-8 text (byte 13)"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_lines_are_refused_with_their_number(name: str, tmp_path: Path) -> None:
    line, expected = BROKEN[name]
    if isinstance(line, dict):
        line = json.dumps(line)
    raw = line if isinstance(line, bytes) else str(line).encode()
    path = tmp_path / "data.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n" + raw + b"\n")
    with pytest.raises(InputError) as caught:
        list(read_records(path))
    message = str(caught.value)
    assert expected in message and str(path) in message and "line 2" in message
    assert "\n" not in message and len(message) < 400 + len(str(path))


@pytest.mark.parametrize(
    ("name", "raw", "expected"),
    [
        ("empty.jsonl", b"", "the file is empty"),
        ("blank.jsonl", b"\n \n", "the file is empty"),
        ("far.jsonl", b"\n" * 5000, "no records in it"),
        ("list.json", b"[]", "no records in it"),
        ("scalar.json", b"3", "got int"),
        ("bad.json", b'[{"prompt": "p"},\n {"prompt"]', "malformed JSON"),
        ("item.json", b"[3]", "record 1: expected a JSON object, got int"),
        ("bad.parquet", b"PAR1 nothing", "not a readable Parquet file"),
        ("zero.parquet", b"", "not a readable Parquet file"),
        ("fields.jsonl", b'{"a": 1, "b": 2}', "fields of no known format (a, b)"),
        ("flat.jsonl", b'{"prompt": "p", "response": "r"}', "no score field"),
        ("gzip.jsonl", b"\x1f\x8b\x08\x00\x00", "not UTF-8 text"),
        (
            "unusable.jsonl",
            b'{"prompt": "p", "responses": ["a"], "scores": [1]}',
            "no usable record: 1 read, 1 fewer than 2 candidates",
        ),
        (
            "turns.jsonl",
            b'{"chosen": [{"role": "u", "content": "1"}, {"role": "a", "content": "2"}],'
            b' "rejected": [{"role": "u", "content": "3"}, {"role": "a", "content": "4"}]}',
            "no usable record: 1 read, 1 no prompt",
        ),
        (
            "prompts.jsonl",
            b'{"prefix": ["a", "b"], "suffix": ["x", "y"], "reward": [1, 2]}',
            "prefix has different prompts",
        ),
    ],
)
def test_broken_files(name: str, raw: bytes, expected: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(raw)
    with pytest.raises(InputError) as caught:
        list(read_records(path))
    assert expected in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_scores_that_begin_later_are_not_taken_for_best_first(tmp_path: Path) -> None:
    path = _file(tmp_path, {"prompt": "p", "responses": ["a", "b"]}, GOOD)
    with pytest.raises(InputError, match="line 2: has scores or ranks, but the first record had"):
        list(read_records(path))
    assert len(list(read_records(path, format="best_first"))) == 2


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"format": "canonicl"}, "unknown format 'canonicl', did you mean 'canonical'"),
        ({"format": "preference", "score_key": "x"}, "has no scores"),
        ({"max_candidates": 1}, "max_candidates must be at least 2, got 1"),
        ({"normalize_rewards": "all"}, "normalize_rewards must be none or group, got 'all'"),
    ],
)
def test_wrong_options_are_refused_at_once(options: dict, expected: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=expected):
        read_records(_file(tmp_path, GOOD), **options)


@pytest.mark.parametrize(
    "name", ["nope.jsonl", "./nope", "/nope/x", "~/nope", "a/b/c", "data", "x\\y", "owner/x.json"]
)
def test_missing_paths_are_never_asked_of_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("looked for on the Hub")

    monkeypatch.setattr("datasets.load_dataset", forbidden)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no such file"):
        list(read_records(name))


def test_hub_names_reach_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(name: str, config: str | None, split: str) -> list[dict]:
        asked.append((name, config, split))
        return [GOOD]

    monkeypatch.setattr("datasets.load_dataset", load)
    for name in ("owner/set", "owner/set:test", "owner/set:main:test"):
        assert len(list(read_records(name))) == 1
    assert asked == [
        ("owner/set", None, "train"),
        ("owner/set", None, "test"),
        ("owner/set", "main", "test"),
    ]


def test_a_split_of_the_hub_goes_through_cache_commands_and_workflow(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    splits = {
        ("main", "test"): [GOOD | {"prompt": f"p{i} "} for i in range(3)],
        (None, "train"): [GOOD],
    }
    asked = []

    def load(name: str, config: str | None = None, *, split: str) -> datasets.Dataset:
        asked.append((name, config, split))
        return datasets.Dataset.from_list(splits[config, split])

    monkeypatch.setattr("datasets.load_dataset", load)
    name, tokenizer = "owner/set:main:test", make_tokenizer()
    for _ in range(2):  # built, and opened
        groups, report = load_groups(name, tokenizer, cache_dir=tmp_path)
        assert [g.name for g in groups] == [f"{name}:{i}" for i in (1, 2, 3)] and report.kept == 3
    assert len(load_groups("owner/set", tokenizer, cache_dir=tmp_path)[0]) == 1
    assert len(list(tmp_path.glob("groups-*[!k]"))) == 2  # an entry for each, beside its lock
    assert [item.prompt for item in read_items(name)] == ["p0 ", "p1 ", "p2 "]
    assert main(["inspect", name, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["records"]["kept"] == 3
    assert set(asked) == {("owner/set", "main", "test"), ("owner/set", None, "train")}
    datasets.Dataset.from_list(splits["main", "test"]).save_to_disk(tmp_path / "saved")
    with pytest.raises(InputError, match="saved by save_to_disk has no configuration 'main'"):
        list(read_records(f"{tmp_path / 'saved'}:main:test"))


def test_a_data_set_that_is_not_there_offline_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    use_hub.cache_clear()
    try:
        assert main(["inspect", "owner/absent-set:main:test"]) == 2
    finally:
        use_hub.cache_clear()
    error = capsys.readouterr().err
    assert "owner/absent-set:main:test: cannot be loaded as a data set" in error
    assert error.count("\n") == 1


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        raise ConnectionError("no network\nand a second line")

    monkeypatch.setattr("datasets.load_dataset", load)
    with pytest.raises(InputError, match="ConnectionError: no network and a second line"):
        list(read_records("owner/set"))
