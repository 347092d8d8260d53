"""``fastrank sample``, ``reward`` and ``evaluate`` as a user calls them: what they print, what they
refuse, what they leave behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastrank.cli.main import main

REWARDS = """
def length(prompt, response):
    return len(response)

def fails(prompt, response):
    return 1 / (len(response) - 3)
"""


@pytest.fixture
def files(write_rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Prompts, records and a reward in the folder that commands run in; returns their names."""
    monkeypatch.chdir(tmp_path)
    write_rows([{"prompt": f"say {k}"} for k in range(5)], "prompts.jsonl")
    scored = [{"prompt": "p", "responses": ["a", "bbb"]}, {"prompt": "q", "responses": ["c", ""]}]
    write_rows(scored, "data.jsonl")
    write_rows([{"prompt": "a", "responses": ["b", "c"], "scores": [1, 0]}], "ranked.jsonl")
    write_rows([{"text": "no prompt"}], "texts.jsonl")
    (tmp_path / "rewards.py").write_text(REWARDS)
    return {path.name for path in tmp_path.iterdir()}


def sampling(policy_path: Path, *more: str) -> list[str]:
    names = ["--model", str(policy_path), "--prompts", "prompts.jsonl", "--output", "out.jsonl"]
    return ["sample", *names, "--max_new_tokens", "5", *more]


def rewarding(*more: str) -> list[str]:
    names = ["--data", "data.jsonl", "--output", "out.jsonl", "--reward", "rewards.py:length"]
    return ["reward", *names, *more]


def test_samples(policy_path, files, read_rows, run_json, capsys):
    assert main(sampling(policy_path)) == 0
    assert "responses to 5 prompts" in capsys.readouterr().out
    result = run_json(*sampling(policy_path, "--num_responses", "2", "--overwrite"))
    assert result["prompts"] == 5 and result["responses"] + result["duplicates"] <= 10
    assert len(read_rows(Path("out.jsonl"))) == 5


def test_a_repeated_model_is_a_second_policy(policy_path, files, run_json):
    more = ["--model", str(policy_path), "--num-responses", "1"]
    assert run_json(*sampling(policy_path, *more))["models"] == [str(policy_path)] * 2


def test_options_come_from_a_yaml_file(policy_path, files, run_json):
    Path("sample.yaml").write_text(
        "strategy: diverse_beam\nnum_responses: 4\nnum_beam_groups: 2\nstop: ['x']\n"
    )
    assert run_json(*sampling(policy_path, "--config", "sample.yaml"))["responses"] > 0


def test_rewards(files, read_rows, run_json, capsys):
    result = run_json(*rewarding())
    assert result["mean"] == pytest.approx(5 / 3) and result["kind"] == "function"
    assert [row["scores"] for row in read_rows(Path("out.jsonl"))] == [[1.0, 3.0], [1.0]]
    assert main(rewarding("--overwrite", "true")) == 0
    assert "rewards     mean 1.667, from 1 to 3" in capsys.readouterr().out


def test_all_figures_of_an_evaluation(policy_path, files, capsys):
    policy = str(policy_path)
    arguments = ["evaluate", "--model", policy, "--prompts", "prompts.jsonl", "--against", policy]
    arguments += ["--reward", "rewards.py:length", "--perplexity_model", policy]
    arguments += ["--data", "ranked.jsonl", "--max_new_tokens", "4"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    for word in ("reward", "0 won, 5 tied, 0 lost", "perplexity", "pairwise_accuracy"):
        assert word in text
    assert main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["reward"]["num_prompts"] == 5 and result["perplexity"] > 1


WRONG = {
    "sample": [
        ("--strategy beem", "strategy"),
        ("--strategy beam --top_p 0.9", "top_p belongs to strategy top_p, got beam"),
        ("--top_p 1.5", "top_p must be above 0 and at most 1, got 1.5"),
        ("--num_responses 0", "num_responses must be at least 1, got 0"),
        ("--batch_size 0", "batch_size must be at least 1, got 0"),
        ("--max_new_tokens 500", "max_new_tokens must be below the model's context of 128"),
        ("--model ./absent", "./absent: no such model folder"),
        ("--prompts absent.jsonl", "absent.jsonl: no such file"),
        ("--prompts texts.jsonl", "line 1: fields of no known format (text)"),
        ("--output absent/out.jsonl", "its folder does not exist"),
        ("--format prefrence", "did you mean 'preference'?"),
        ("--device gpu", "--device must be auto, cpu or cuda"),
        ("--temprature 1", "did you mean --temperature?"),
    ],
    "reward": [
        ("--reward absent.py:length", "absent.py: no such reward file"),
        ("--reward rewards.py:lenght", "rewards.py: no function 'lenght' in it"),
        ("--reward rewards.py", "reward must be FILE.py:function"),
        ("--reward rewards.py:fails", "response 2: rewards.py:fails raised ZeroDivisionError"),
        ("--reward ./absent", "./absent: no such model folder"),
        ("--data absent.jsonl", "absent.jsonl: no such file"),
        ("--output no/out.jsonl", "its folder does not exist"),
        ("--batch_size 0", "batch_size must be at least 1, got 0"),
        ("--partial yes", "partial"),
    ],
    "evaluate": [
        ("", "expected --prompts (fresh samples) or --data (ranking), got neither"),
        ("--prompts absent.jsonl", "absent.jsonl: no such file"),
        ("--prompts prompts.jsonl --reward absent.py:f", "absent.py: no such reward file"),
        ("--prompts prompts.jsonl --perplexity_model ./no", "./no: no such model folder"),
        ("--prompts prompts.jsonl --output no/x.jsonl", "its folder does not exist"),
        ("--data prompts.jsonl", "no known format"),
        ("--prompts prompts.jsonl --num_responses 0", "num_responses must be at least 1"),
    ],
}


@pytest.mark.parametrize(
    ("command", "more", "said"), [(name, *case) for name, cases in WRONG.items() for case in cases]
)
def test_what_is_wrong_is_one_line_and_nothing_is_written(
    command, more, said, policy_path, files, tmp_path, capsys
):
    arguments = {
        "sample": sampling(policy_path),
        "reward": rewarding(),
        "evaluate": ["evaluate", "--model", str(policy_path)],
    }
    assert main([*arguments[command], *more.split()]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"fastrank {command}: error: ")
    assert said in captured.err and captured.err.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} - {"__pycache__"} == files
