"""``fastrank reward`` as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastrank.cli.main import main

ROWS = [{"prompt": "p", "responses": ["a", "bbb"]}, {"prompt": "q", "responses": ["c", ""]}]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "rewards.py").write_text(
        "def length(prompt, response):\n    return len(response)\n\n"
        "def fails(prompt, response):\n    return 1 / (len(response) - 3)\n"
    )
    return path


def arguments(data: Path, reward: str, *more: str) -> list[str]:
    output = data.parent / "out.jsonl"
    return ["reward", "--data", str(data), "--output", str(output), "--reward", reward, *more]


def test_scores_are_written_and_summed_up(data, tmp_path, capsys):
    reward = f"{tmp_path}/rewards.py:length"
    assert main(arguments(data, reward, "--json")) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["mean"] == pytest.approx(5 / 3) and result["kind"] == "function"
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["scores"] for row in rows] == [[1.0, 3.0], [1.0]]
    assert main(arguments(data, reward)) == 0
    assert "rewards     mean 1.667, from 1 to 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("reward", "more", "said"),
    [
        ("absent.py:length", [], "absent.py: no such reward file"),
        ("{}/rewards.py:lenght", [], "rewards.py: no function 'lenght' in it"),
        ("{}/rewards.py", [], "reward must be FILE.py:function"),
        ("{}/rewards.py:fails", [], "response 2: rewards.py:fails raised ZeroDivisionError"),
        ("./absent", [], "./absent: no such model folder"),
        ("{}/rewards.py:length", ["--data", "absent.jsonl"], "absent.jsonl: no such file"),
        ("{}/rewards.py:length", ["--output", "no/out.jsonl"], "the folder no does not exist"),
        ("{}/rewards.py:length", ["--batch_size", "0"], "batch_size must be at least 1, got 0"),
        ("{}/rewards.py:length", ["--partial", "yes"], "partial"),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_written(
    data, tmp_path, capsys, reward, more, said
):
    assert main(arguments(data, reward.format(tmp_path), *more)) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("fastrank reward: error: ")
    assert said in captured.err and captured.err.count("\n") == 1
    assert not list(tmp_path.glob("out.jsonl*"))
