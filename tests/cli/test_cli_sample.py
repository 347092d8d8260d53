"""``fastrank sample`` as a user calls it: what is printed, what is refused, what is left behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_models

from fastrank.cli.main import main


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_llama(tmp_path_factory.mktemp("policy"))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"say {k}"}) + "\n" for k in range(5)))
    return path


def arguments(policy: Path, prompts: Path, output: Path, *more: str) -> list[str]:
    files = ["--model", str(policy), "--prompts", str(prompts), "--output", str(output)]
    return ["sample", *files, "--max_new_tokens", "5", *more]


def test_it_prints_a_summary_and_json_on_the_last_line(policy, prompts, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    assert main(arguments(policy, prompts, output)) == 0
    assert "responses to 5 prompts" in capsys.readouterr().out
    assert main(arguments(policy, prompts, output, "--json", "--num_responses", "2")) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["prompts"] == 5 and result["responses"] + result["duplicates"] <= 10
    assert len(output.read_text().splitlines()) == 5


def test_a_repeated_model_is_a_second_policy(policy, prompts, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    more = ["--model", str(policy), "--num-responses", "1", "--json"]
    assert main(arguments(policy, prompts, output, *more)) == 0
    assert json.loads(capsys.readouterr().out)["models"] == [str(policy)] * 2


def test_options_come_from_a_yaml_file(policy, prompts, tmp_path, capsys):
    config = tmp_path / "sample.yaml"
    config.write_text("strategy: diverse_beam\nnum_responses: 4\nnum_beam_groups: 2\nstop: ['x']\n")
    output = tmp_path / "out.jsonl"
    assert main(arguments(policy, prompts, output, "--config", str(config), "--json")) == 0
    assert json.loads(capsys.readouterr().out)["responses"] > 0


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--strategy", "beem"], "strategy"),
        (["--strategy", "beam", "--top_p", "0.9"], "top_p belongs to strategy top_p, got beam"),
        (["--top_p", "1.5"], "top_p must be above 0 and at most 1, got 1.5"),
        (["--num_responses", "0"], "num_responses must be at least 1, got 0"),
        (["--batch_size", "0"], "batch_size must be at least 1, got 0"),
        (["--max_new_tokens", "500"], "max_new_tokens must be below the model's context of 128"),
        (["--model", "./absent"], "./absent: no such model folder"),
        (["--prompts", "absent.jsonl"], "absent.jsonl: no such file"),
        (["--output", "absent/out.jsonl"], "the folder absent does not exist"),
        (["--format", "prefrence"], "did you mean 'preference'?"),
        (["--device", "gpu"], "--device must be auto, cpu or cuda"),
        (["--temprature", "1"], "did you mean --temperature?"),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_written(
    policy, prompts, tmp_path, capsys, more, said
):
    output = tmp_path / "out.jsonl"
    assert main(arguments(policy, prompts, output, *more)) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("fastrank sample: error: ")
    assert said in captured.err and captured.err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.jsonl"]


def test_a_file_without_prompts_is_refused(policy, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "no prompt"}\n')
    assert main(arguments(policy, path, tmp_path / "out.jsonl")) == 2
    assert "line 1: fields of no known format (text)" in capsys.readouterr().err
