"""``fastrank train`` with losses that subtract a reference model's scores."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import tiny_models

from fastrank.cli.main import main
from fastrank.data.report import strict_pairs
from fastrank.tasks.menu import menu_task

ROWS = [
    {"prompt": f"q{k}", "responses": ["ab", "cde", "f"], "scores": [2, 1, k % 2]} for k in range(8)
]


@pytest.fixture
def command(policy_path, write_rows) -> list[str]:
    """Two steps in a folder of this test's own."""
    data: Path = write_rows(ROWS)
    command = ["train", "--data", str(data), "--output_dir", str(data.parent / "run")]
    command += ["--model", str(policy_path), "--cache_dir", str(data.parent / "cache")]
    return [*command, "--max_steps", "2", "--save_strategy", "no", "--disable_tqdm", "true"]


def test_the_starting_model_is_the_default_reference(command, tmp_path, run_json) -> None:
    result = run_json(*command, "--loss", "dpo")
    # Equal policy and reference: every pair costs softplus(0). Two or three strict pairs a prompt.
    rows = sum(2 if row["scores"][1] == row["scores"][2] else 3 for row in ROWS)
    splits = {"eval": result["heldout_prompts"], "train_split": result["train_prompts"]}
    total = sum(result["before"][name]["rank_loss"] * count for name, count in splits.items())
    assert total == pytest.approx(rows * math.log(2), rel=1e-5)
    before, after = (result[when]["train_split"]["rank_loss"] for when in ("before", "after"))
    assert after != before
    assert len(list((tmp_path / "cache").glob("reference-*.safetensors"))) == 2


def test_another_reference_changes_the_loss(
    command, policy_path, other_policy_path, run_json
) -> None:
    found = []
    for reference in (other_policy_path, policy_path):
        options = ["--loss", "dpo", "--reference_model", reference, "--overwrite_output_dir"]
        found.append(run_json(*command, *options)["before"]["train_split"]["rank_loss"])
    assert found[1] != pytest.approx(found[0], rel=1e-3)


def test_the_built_in_task_is_its_own_reference(tmp_path, run_json) -> None:
    arguments = ["--output_dir", tmp_path / "run", "--max_steps", "1", "--eval_groups", "8"]
    options = ["--loss", "dpo", "--save_strategy", "no", "--disable_tqdm", "true"]
    first = run_json("train", *arguments, *options)["before"]["eval"]["rank_loss"]
    pairs = [strict_pairs(record.scores)[0] for record in menu_task(seed=42).heldout]
    assert first == pytest.approx(math.log(2) * sum(pairs) / len(pairs), rel=1e-5)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--reference_model", "x"], "--reference_model is for losses that use a reference"),
        (["--loss", "dpo", "--reference_model", "./no"], "./no: no such model folder"),
    ],
)
def test_a_reference_that_is_of_no_use_is_one_line(command, tmp_path, capsys, more, said) -> None:
    assert main([*command, *more]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_reference_with_other_tokens_is_refused(command, tmp_path, capsys) -> None:
    other = tiny_models.save_llama(tmp_path / "other")
    tokenizer = tiny_models.ascii_tokenizer()
    tokenizer.add_tokens(["extra"])
    tokenizer.save_pretrained(other)
    assert main([*command, "--loss", "dpo", "--reference_model", str(other)]) == 2
    assert "its tokens are not those of --model" in capsys.readouterr().err
