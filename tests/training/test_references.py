"""``fastrank train`` with losses that subtract a reference model's scores."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny_models

from fastrank.cli.main import main
from fastrank.data.report import strict_pairs
from fastrank.tasks.menu import menu_task

ROWS = [
    {"prompt": f"q{k}", "responses": ["ab", "cde", "f"], "scores": [2, 1, k % 2]} for k in range(8)
]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_llama(tmp_path_factory.mktemp("policy"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def train(policy: Path | None, data: Path, *more: str) -> int:
    arguments = ["train", "--data", str(data), "--output_dir", str(data.parent / "run")]
    arguments += ["--model", str(policy), "--cache_dir", str(data.parent / "cache")]
    arguments += ["--max_steps", "2", "--save_strategy", "no", "--disable_tqdm", "true", "--json"]
    return main([*arguments, *more])


def result_of(capsys: Any) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_starting_model_is_the_default_reference(policy, data, capsys) -> None:
    assert train(policy, data, "--loss", "dpo") == 0
    result = result_of(capsys)
    # Equal policy and reference: every pair costs softplus(0). Two or three strict pairs a prompt.
    rows = sum(2 if row["scores"][1] == row["scores"][2] else 3 for row in ROWS)
    splits = {"eval": result["heldout_prompts"], "train_split": result["train_prompts"]}
    total = sum(result["before"][name]["rank_loss"] * count for name, count in splits.items())
    assert total == pytest.approx(rows * math.log(2), rel=1e-5)
    assert (
        result["after"]["train_split"]["rank_loss"] != result["before"]["train_split"]["rank_loss"]
    )
    assert len(list((data.parent / "cache").glob("reference-*.safetensors"))) == 2


def test_another_reference_changes_the_loss(policy, data, tmp_path, capsys) -> None:
    other = tiny_models.save_llama(tmp_path / "other", seed=7)
    assert train(policy, data, "--loss", "dpo", "--reference_model", str(other)) == 0
    first = result_of(capsys)["before"]["train_split"]["rank_loss"]
    options = ["--reference_model", str(policy), "--overwrite_output_dir"]
    assert train(policy, data, "--loss", "dpo", *options) == 0
    assert result_of(capsys)["before"]["train_split"]["rank_loss"] != pytest.approx(first, rel=1e-3)


def test_the_built_in_task_is_its_own_reference(tmp_path, capsys) -> None:
    arguments = ["--output_dir", str(tmp_path / "run"), "--max_steps", "1", "--json"]
    options = ["--loss", "dpo", "--save_strategy", "no", "--disable_tqdm", "true"]
    assert main(["train", *arguments, *options]) == 0
    first = result_of(capsys)["before"]["eval"]["rank_loss"]
    pairs = [strict_pairs(record.scores)[0] for record in menu_task(seed=42).heldout]
    assert first == pytest.approx(math.log(2) * sum(pairs) / len(pairs), rel=1e-5)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--reference_model", "x"], "--reference_model is for losses that use a reference"),
        (["--loss", "dpo", "--reference_model", "./no"], "./no: no such model folder"),
    ],
)
def test_a_reference_that_is_of_no_use_is_one_line(policy, data, capsys, more, said) -> None:
    assert train(policy, data, *more) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (data.parent / "run").exists()


def test_a_reference_with_other_tokens_is_refused(policy, data, tmp_path, capsys) -> None:
    other = tiny_models.save_llama(tmp_path / "other")
    tokenizer = tiny_models.ascii_tokenizer()
    tokenizer.add_tokens(["extra"])
    tokenizer.save_pretrained(other)
    assert train(policy, data, "--loss", "dpo", "--reference_model", str(other)) == 2
    assert "its tokens are not those of --model" in capsys.readouterr().err
