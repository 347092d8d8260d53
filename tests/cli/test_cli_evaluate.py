"""``fastrank evaluate`` as a user calls it."""

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
    path.write_text("".join(json.dumps({"prompt": f"say {k}"}) + "\n" for k in range(4)))
    (tmp_path / "rewards.py").write_text("def length(p, r):\n    return len(r)\n")
    return path


def test_all_figures_at_once(policy, prompts, tmp_path, capsys):
    ranked = tmp_path / "ranked.jsonl"
    ranked.write_text('{"prompt": "a", "responses": ["b", "c"], "scores": [1, 0]}\n')
    arguments = ["evaluate", "--model", str(policy), "--prompts", str(prompts)]
    arguments += ["--reward", f"{tmp_path}/rewards.py:length", "--against", str(policy)]
    arguments += ["--perplexity_model", str(policy), "--data", str(ranked)]
    arguments += ["--max_new_tokens", "4"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    for word in ("reward", "0 won, 4 tied, 0 lost", "perplexity", "pairwise_accuracy"):
        assert word in text
    assert main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["reward"]["num_prompts"] == 4 and result["perplexity"] > 1


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([], "expected --prompts (fresh samples) or --data (ranking), got neither"),
        (["--prompts", "absent.jsonl"], "absent.jsonl: no such file"),
        (["--prompts", "{p}", "--reward", "absent.py:f"], "absent.py: no such reward file"),
        (["--prompts", "{p}", "--perplexity_model", "./no"], "./no: no such model folder"),
        (["--prompts", "{p}", "--output", "no/x.jsonl"], "the folder no does not exist"),
        (["--data", "{p}"], "no known format"),
        (["--prompts", "{p}", "--num_responses", "0"], "num_responses must be at least 1"),
    ],
)
def test_what_is_wrong_is_one_line(policy, prompts, capsys, more, said):
    arguments = [part.format(p=prompts) for part in more]
    assert main(["evaluate", "--model", str(policy), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("fastrank evaluate: error: ")
    assert said in captured.err and captured.err.count("\n") == 1
