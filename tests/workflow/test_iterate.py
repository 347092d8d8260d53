"""Iterated rounds: what each leaves, going on after a kill, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from holders import another_holder
from killing import run_until_lines
from transformers import AutoTokenizer

from fastrank.cli.main import main
from fastrank.data.locks import LOCK_FILE
from fastrank.training.checkpoint import find_checkpoints


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with prompts and a reward, which the runs go into as well."""
    folder = tmp_path_factory.mktemp("iterate")
    rows = [{"prompt": "go " * (k % 4) + str(k)} for k in range(10)]
    for name, chosen in (("prompts", rows[:8]), ("heldout", rows[8:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in chosen))
    (folder / "rewards.py").write_text(
        "def vowels(p, r):\n    return sum(c in 'aeiouAEIOU' for c in r) - len(r) / 20\n"
    )
    return folder


def arguments(inputs: Path, model: Path, run: str, *more: str) -> list[str]:
    files = ["--model", str(model), "--prompts", f"{inputs}/prompts.jsonl"]
    files += ["--reward", f"{inputs}/rewards.py:vowels", "--output_dir", f"{inputs}/{run}"]
    sizes = ["--num_responses", "3", "--max_new_tokens", "6", "--sample_batch_size", "4"]
    training = ["--learning_rate", "1e-2", "--max_steps", "4", "--disable_tqdm", "true"]
    training += ["--save_strategy", "steps", "--save_steps", "1", "--logging_steps", "1"]
    return ["iterate", *files, *sizes, *training, "--rounds", "2", *more]


def weights(run: Path, number: int) -> bytes:
    return (run / f"round-{number}" / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(inputs, policy_path) -> Path:
    """A run of two rounds that nothing interrupted; not to be written to."""
    assert main(arguments(inputs, policy_path, "whole")) == 0
    return inputs / "whole"


def test_every_round_starts_from_the_model_before(policy_path, whole):
    results = [json.loads((whole / f"round-{k}" / "result.json").read_text()) for k in (1, 2)]
    assert results[0]["from"] == str(policy_path)
    assert results[1]["from"] == results[0]["model"] == str(whole / "round-1" / "model")
    for number, result in enumerate(results, start=1):
        ranked = (whole / f"round-{number}" / "ranked.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in ranked]
        assert len(rows) == 8 and {s for row in rows for s in row["sources"]} == {result["from"]}
        for row in rows:
            for response, score in zip(row["responses"], row["scores"], strict=True):
                vowels = sum(c in "aeiouAEIOU" for c in response)
                assert score == pytest.approx(vowels - len(response) / 20)
        assert result["training"]["steps"] == 4
    samples = [(whole / f"round-{k}" / "samples.jsonl").read_text() for k in (1, 2)]
    assert samples[0] != samples[1] and weights(whole, 1) != weights(whole, 2)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_no_command_writes_where_another_run_does(
    inputs, policy_path, tmp_path, capsys, monkeypatch
):
    """Known before anything is loaded, and nothing is written."""
    for module in ("workflow.online", "training.run"):
        monkeypatch.setattr(f"fastrank.{module}._load", None)
    files = arguments(inputs, policy_path, "taken")[1:7]
    run = inputs / "taken"
    with another_holder(run / LOCK_FILE) as pid:
        for command in (
            arguments(inputs, policy_path, "taken"),
            ["train", "--output_dir", str(run), "--overwrite_output_dir"],
            [
                *("train", *files[:2], "--online_prompts", files[3], *files[4:6]),
                *("--online_every", "1", "--output_dir", str(run)),
            ],
        ):
            assert main(command) == 2, command
            said = capsys.readouterr().err
            assert said.startswith(f"fastrank {command[0]}: error: output_dir {run} is being wri")
            assert said.count("\n") == 1 and f"process {pid} on" in said
            assert [path.name for path in run.iterdir()] == [LOCK_FILE]


def test_a_finished_run_is_only_read_and_more_rounds_may_follow(
    inputs, policy_path, whole, run_json
):
    run = inputs / "longer"
    shutil.copytree(whole, run)
    result = run_json(*arguments(inputs, policy_path, "longer", "--rounds", "3"))
    assert [r["round"] for r in result["rounds"]] == [1, 2, 3]
    assert weights(run, 2) == weights(whole, 2) != weights(run, 3)


def test_a_run_killed_while_training_ends_the_same(inputs, policy_path, whole):
    run = inputs / "killed"
    metrics = run / "round-2" / "model" / "metrics.jsonl"
    # Two evaluations before the first step, then a line a step.
    run_until_lines(arguments(inputs, policy_path, "killed"), metrics, lines=4)
    assert find_checkpoints(run / "round-2" / "model")
    assert not (run / "round-2" / "result.json").exists()
    assert main(arguments(inputs, policy_path, "killed")) == 0
    for number in (1, 2):
        assert weights(run, number) == weights(whole, number)


def test_a_run_stopped_between_its_steps_ends_the_same(inputs, policy_path, whole):
    run = inputs / "stopped"
    shutil.copytree(whole, run)
    text = (run / "round-2" / "ranked.jsonl").read_text()
    for name in ("result.json", "rewards.json", "ranked.jsonl"):
        (run / "round-2" / name).unlink()
    shutil.rmtree(run / "round-2" / "model")
    (run / "round-1" / "result.json").write_text(
        (whole / "round-1" / "result.json").read_text().replace(str(whole), str(run))
    )
    assert main(arguments(inputs, policy_path, "stopped")) == 0
    assert weights(run, 2) == weights(whole, 2)
    assert (run / "round-2" / "ranked.jsonl").read_text() == text


def test_held_out_prompts_are_evaluated_after_every_round(inputs, policy_path, capsys):
    more = ["--eval_prompts", f"{inputs}/heldout.jsonl", "--json", "--max_steps", "1"]
    assert main(arguments(inputs, policy_path, "held-out", *more)) == 0
    out = capsys.readouterr().out
    for result in json.loads(out.splitlines()[-1])["rounds"]:
        found = result["evaluation"]
        assert found["reward"]["num_prompts"] == 2 and found["perplexity"] > 1
    assert "after training, held out" in out


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--rounds", "0"], "rounds must be at least 1, got 0"),
        (["--model", "./absent"], "./absent: no such model folder"),
        (["--reward", "absent.py:f"], "absent.py: no such reward file"),
        (["--strategy", "beam", "--top_p", "0.9"], "top_p belongs to strategy top_p"),
    ],
)
def test_wrong_options_are_one_line(inputs, policy_path, capsys, more, said):
    assert main(arguments(inputs, policy_path, "wrong", *more)) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (inputs / "wrong").exists()


def test_a_field_map_and_a_chat_template_hold_for_every_step(inputs, policy_path, run_json, capsys):
    rows = [{"q": "go " * (k % 4) + str(k), "context": "C"} for k in range(8)]
    file = inputs / "mapped.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = ["--prompts", str(file), "--columns", "prompt=q,context=", "--chat_template", "chatml"]
    more += ["--as_chat", "--rounds", "1", "--max_steps", "1", "--eval_prompts", str(file)]
    result = run_json(*arguments(inputs, policy_path, "mapped", *more))
    first = inputs / "mapped" / "round-1"
    assert result["rounds"][0]["evaluation"]["reward"]["num_prompts"] == 8
    assert "<|im_start|>" in AutoTokenizer.from_pretrained(first / "model").chat_template
    report = json.loads((first / "model" / "summary.json").read_text())["data"][0]
    assert report["records"]["kept"] == 8
    assert main(arguments(inputs, policy_path, "mapped", *more, "--chat_template", "hh")) == 2
    assert "another chat template" in capsys.readouterr().err


def test_a_folder_of_another_run_is_refused(inputs, policy_path, whole, capsys):
    assert main(arguments(inputs, policy_path, "whole", "--learning_rate", "0.5")) == 2
    assert "holds a run with another learning_rate" in capsys.readouterr().err
    (inputs / "other").mkdir()
    (inputs / "other" / "notes.txt").write_text("mine")
    assert main(arguments(inputs, policy_path, "other")) == 2
    assert "holds other files; choose a new folder" in capsys.readouterr().err
