"""``fastrank train`` as people call it: what it learns, says and writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from menu_files import save_menu_model, write_menu
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastrank.cli.main import main
from fastrank.metrics import pairwise_accuracy
from fastrank.training.callbacks import read_metrics
from fastrank.training.config import RankConfig
from fastrank.training.run import built_in_job
from fastrank.training.splits import choose_groups
from fastrank.training.trainer import RankTrainer
from fastrank.visual.shown_groups import read_groups

QUICK = ["--disable_tqdm", "true", "--logging_steps", "2", "--save_strategy", "no"]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_menu_model(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(scope="module")
def data_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_menu(tmp_path_factory.mktemp("data") / "menu.jsonl", 40, seed=9))


def test_the_built_in_task_is_learnt(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shortened run of what ``make train`` does; the full one is measured by a slow test."""
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    arguments = ["train", "--output_dir", str(run), "--max_steps", "120", "--json", *QUICK]
    arguments += ["--eval_groups", "64"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    assert 0.4 < result["before"]["eval"]["rewards/accuracies"] < 0.6
    assert result["after"]["eval"]["rewards/accuracies"] > 0.75
    assert result["steps"] == 120 and result["output_dir"] == str(run)
    for text in (
        "precision: float32",
        "dropout: ",
        "loss: RRHF(",
        "held out",
        "rewards/accuracies",
    ):
        assert text in out
    assert (run / "training.png").read_bytes().startswith(b"\x89PNG")
    report = (run / "report.html").read_text()
    assert result["report"] == str(run / "report.html") and report.count("<details") == 128
    kept = read_groups(run / "held_out.jsonl")
    assert all(len(g.before) == len(g.after) == len(g.responses) for g in kept)
    accuracy = pairwise_accuracy([g.after for g in kept], [g.rewards for g in kept])
    assert accuracy == pytest.approx(result["after"]["eval"]["rewards/accuracies"])
    rows = read_metrics(run / "metrics.jsonl")
    assert {"eval_loss", "train_split_loss"} <= {key for row in rows for key in row}
    assert [row["step"] for row in rows if "grad_norm" in row] == list(range(2, 121, 2))
    assert AutoModelForCausalLM.from_pretrained(run).config.vocab_size == 32
    assert AutoTokenizer.from_pretrained(run).eos_token == "<eos>"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["after"] == result["after"]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]  # nothing beside the output folder


def test_table_and_summary_are_of_the_best_model_where_that_is_saved(
    tmp_path: Path, capsys: Any
) -> None:
    run = tmp_path / "run"
    arguments = ["train", "--output_dir", str(run), "--max_steps", "6", "--eval_groups", "8"]
    arguments += ["--load_best_model_at_end", "true", "--metric_for_best_model", "loss"]
    arguments += ["--greater_is_better", "true"]  # so that it is the first
    for what in ("eval", "save"):
        arguments += [f"--{what}_strategy", "steps", f"--{what}_steps", "2"]
    assert main([*arguments, "--logging_steps", "2", "--disable_tqdm", "true"]) == 0
    said = capsys.readouterr().out
    assert "6 steps in " in said and f"; model of step 2, the best, in {run}" in said
    summary = json.loads((run / "summary.json").read_text())
    assert summary["model_step"] == 2
    table = said[said.index("\n\n") :].split("6 steps in ")[0].strip("\n")
    card = (run / "README.md").read_text()
    assert "train_split" not in card and table.splitlines()[-1] in card
    assert all(line in card for line in table.splitlines()[-5:]) and "- steps: 2 of" in card
    config = RankConfig(output_dir=str(tmp_path / "again"), use_cpu=True, report_to="none")
    job = built_in_job(config)
    saved = RankTrainer(AutoModelForCausalLM.from_pretrained(run), config, job.train)
    splits = {"eval": job.heldout, "train_split": choose_groups(job.train, 8, seed=config.seed)}
    for name, groups in splits.items():
        found = saved.evaluate(groups, metric_key_prefix=name)
        for key in ("rank_loss", "sft_loss", "rewards/accuracies"):
            assert summary["after"][name][key] == pytest.approx(found[f"{name}_{key}"]), (name, key)
    last = [row for row in read_metrics(run / "metrics.jsonl") if row.get("step") == 6]
    assert any(
        row["eval_rank_loss"] != pytest.approx(summary["after"]["eval"]["rank_loss"])
        for row in last
        if "eval_rank_loss" in row
    )


def test_the_built_in_task_takes_one_thread_whatever_is_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    torch.set_num_threads(2)
    built_in_job(RankConfig(output_dir=str(tmp_path), use_cpu=True))
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("loss", ["rrhf", "pro"])
def test_a_model_and_a_file(
    tmp_path: Path, capsys: Any, model_path: str, data_path: str, loss: str
) -> None:
    config = tmp_path / "options.yaml"
    config.write_text(f"model: {model_path}\nlearning_rate: 3e-3\nmax_steps: 4\nloss: listmle\n")
    run = tmp_path / "run"
    arguments = ["--config", str(config), "--data", data_path, "--loss", loss]
    assert main(["train", *arguments, "--output_dir", str(run), "--json", *QUICK]) == 0
    out = capsys.readouterr().out
    assert "40 read, 40 kept" in out
    assert "36 prompts to train on, 4 held out" in out
    result = json.loads(out.splitlines()[-1])
    assert result["loss"] == loss and result["steps"] == 4
    assert result["train_prompts"] == 36 and result["heldout_prompts"] == 4
    assert result["after"]["train_split"]["loss"] < result["before"]["train_split"]["loss"]


def test_held_out_data_of_its_own_or_none(
    tmp_path: Path, capsys: Any, model_path: str, data_path: str
) -> None:
    common = ["train", "--model", model_path, "--data", data_path, "--max_steps", "1", *QUICK]
    run = str(tmp_path / "own")
    assert main([*common, "--eval_data", data_path, "--output_dir", run]) == 0
    assert (
        "40 prompts to train on, 40 held out (40 of them also occur in the training data)"
        in capsys.readouterr().out
    )
    run = str(tmp_path / "none")
    assert main([*common, "--eval_fraction", "0", "--output_dir", run]) == 0
    assert "40 prompts to train on, 0 held out" in capsys.readouterr().out


def test_resume_overwrite_and_refusal(
    tmp_path: Path, capsys: Any, run_json: Any, model_path: str, data_path: str
) -> None:
    run = tmp_path / "run"
    common = ["train", "--model", model_path, "--data", data_path, "--output_dir", str(run)]
    common += ["--disable_tqdm", "true", "--max_steps", "4"]
    common += ["--eval_strategy", "no", "--save_steps", "2", "--eval_groups", "8"]
    first = run_json(*common)
    assert main(common) == 2
    assert "holds the checkpoints of an earlier run" in capsys.readouterr().err
    resumed = run_json(*common, "--resume_from_checkpoint", "true")
    assert resumed["before"] == first["before"] and resumed["after"] == first["after"]
    again = run_json(*common, "--overwrite_output_dir", "--max_steps", "2")
    assert again["steps"] == 2 and again["before"] == first["before"]
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_run_that_stops_says_so_with_exit_code_1(
    tmp_path: Path, capsys: Any, model_path: str, data_path: str
) -> None:
    common = ["train", "--model", model_path, "--data", data_path, *QUICK]
    # A learning rate that no model survives.
    arguments = ["--learning_rate", "1e30", "--lr_scheduler_type", "constant", "--max_steps", "9"]
    assert main([*common, "--output_dir", str(tmp_path / "run"), *arguments]) == 1
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert lines[-1].startswith("fastrank train: stopped: ") and "not finite" in lines[-1]
    assert "Traceback" not in captured.err


WRONG = [
    ("--loss rrfh", "did you mean 'rrhf'"),
    ("--model ./absent --data DATA", "./absent: no such model folder"),
    ("--model FILE --data DATA", "expected a model folder, got a file"),
    ("--model MODEL --data absent.jsonl", "absent.jsonl"),
    ("--model MODEL", "--model needs --data too"),
    ("--data DATA", "--data needs --model too"),
    ("--eval_data DATA", "--eval_data needs --model and --data"),
    ("--model MODEL --data DATA --max_length 100", "context of 64 tokens, got 100"),
    (
        "--model MODEL --data DATA --max_prompt_length=60 --max_response_length=60",
        "context of 64 tokens, got 120",
    ),
    ("--model MODEL --data DATA --max_tokens 10", "must fit into max_tokens=10"),
    ("--model MODEL --data DATA --eval_fraction 1.5", "eval_fraction"),
    (  # before a model is looked for
        "--model ./nowhere --data DATA --eval_fraction 0 --load_best_model_at_end true"
        " --eval_strategy steps",
        "load_best_model_at_end needs evaluations, got eval_fraction=0 and no eval_data",
    ),
    ("--nonfinite ignore", "argument --nonfinite: invalid choice: 'ignore'"),
    ("--model MODEL --data BROKEN", "broken.jsonl, line 2: malformed JSON"),
    ("--resume_from_checkpoint absent", "absent is no folder; expected a checkpoint, true or auto"),
    ("--lerning_rate 1", "did you mean --learning_rate"),
    ("--lr 1e-4", "did you mean --learning_rate?"),
    ("--batch_size 3", "did you mean --per_device_train_batch_size?"),
    ("--beta 0.1", """unknown option --beta, did you mean --loss_kwargs '{"beta": 0.1}'?"""),
    ("--attention flash", "attention must be one of"),
    ("--max_tokens many", "many"),
    ("--output_dir FILE/run", "output_dir"),
    ("--output_dir FILE", "must be a folder, got a file"),
    ("--config absent.yaml", "absent.yaml: cannot be read"),
    ("--metric_for_best_model acuracy", "did you mean rewards/accuracies?"),
    ("--eval_groups -1", "eval_groups must be at least 0, got -1"),
    ("--dataset_num_proc 0", "dataset_num_proc must be at least 1, got 0"),
    ("--eval_fraction nan", "eval_fraction must be a finite number, got nan"),
    ("--resume_from_checkpoint true", "runs/built-in holds no checkpoint to go on from; auto"),
    ("--output_dir ~nosuchuser/x", "~nosuchuser/x: no user nosuchuser, whose home"),
    ("--model ~nosuchuser --data DATA", "no user nosuchuser"),
    ("--model MODEL --data ~nosuchuser/d.jsonl", "no user nosuchuser"),
    ("--model MODEL --data DATA --cache_dir ~nosuchuser/x", "no user nosuchuser"),
    ("--model MODEL --data DATA --eval_data ~nosuchuser/x", "no user nosuchuser"),
    ("--model MODEL --data DATA --chat_template ~nosuchuser/x", "no user nosuchuser"),
    ("--loss ~nosuchuser/x.py:f", "no user nosuchuser"),
    ("--config ~nosuchuser/x.yaml", "no user nosuchuser"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_wrong_input_is_one_line_and_nothing_is_written(
    arguments: str,
    message: str,
    tmp_path: Path,
    capsys: Any,
    model_path: str,
    data_path: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    broken = '{"prompt": "a", "responses": ["b", "c"], "scores": [1, 0]}\n{"prompt": \n'
    (tmp_path / "broken.jsonl").write_text(broken)
    names = {"MODEL": model_path, "DATA": data_path, "FILE": "file", "BROKEN": "broken.jsonl"}
    words = arguments.split()
    for short, name in names.items():
        words = [word.replace(short, name) for word in words]
    assert main(["train", *words]) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("fastrank train: error: "), captured.err
    assert message in lines[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.jsonl", "file"]


@pytest.mark.slow
def test_the_built_in_task_reaches_its_goal(tmp_path: Path, capsys: Any) -> None:
    """Held-out accuracy from about 0.5 to at least 0.9."""
    assert main(["train", "--output_dir", str(tmp_path / "run"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0.4 < result["before"]["eval"]["rewards/accuracies"] < 0.6
    assert result["after"]["eval"]["rewards/accuracies"] >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["rrhf", "pro"])
def test_real_data_and_a_real_model(
    tmp_path: Path, capsys: Any, oasst_path: Path, story_model_path: Path, loss: str
) -> None:
    """Three epochs raise the training split's pairwise accuracy by at least 0.10."""
    arguments = ["--model", str(story_model_path), "--data", str(oasst_path), "--loss", loss]
    arguments += ["--learning_rate", "1e-3", "--output_dir", str(tmp_path / "run"), "--json"]
    assert main(["train", *arguments]) == 0
    out = capsys.readouterr().out
    assert "212 read, 212 kept" in out and "truncated" in out
    result = json.loads(out.splitlines()[-1])
    before, after = (
        result[when]["train_split"]["rewards/accuracies"] for when in ("before", "after")
    )
    assert after - before >= 0.10
    assert 0 <= result["after"]["eval"]["rewards/accuracies"] <= 1
