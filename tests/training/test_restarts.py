"""A run goes on with another engine and another number of processes, and is the same run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forced_command
import pytest
import restarts
import torch
from torchrun import torchrun

from fastrank.cli.main import main
from fastrank.data.group import Group
from fastrank.errors import InputError
from fastrank.tasks.menu import menu_records, menu_task
from fastrank.training.callbacks import read_metrics
from fastrank.training.trainer import RankTrainer


@pytest.mark.slow
def test_losses_and_weights_do_not_depend_on_engines_and_processes(tmp_path: Path) -> None:
    """DDP on two processes, FSDP2 on two, one process, FSDP2 on four: every one goes on from
    the checkpoint of the one before. Tied weights, which whole files hold once."""
    for engine, processes, last in restarts.STAGES:
        script = str(Path(restarts.__file__))
        torchrun(processes, script, str(tmp_path), engine, str(last))
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-8"]
    got = torch.load(tmp_path / "8.pt", weights_only=True)
    torch.set_num_threads(1)
    want = restarts.train(tmp_path / "whole", restarts.STAGES[-1][2], use_cpu=True)
    assert [row["step"] for row in got["log"]] == list(range(1, 9))
    for key in ("loss", "rank_loss", "grad_norm", "learning_rate"):
        values = [row[key] for row in got["log"]]
        expected = [row[key] for row in want["log"]]
        assert values == pytest.approx(expected, rel=1e-4, abs=1e-6), key
    for key, weight in want["weights"].items():
        assert float((got["weights"][key] - weight).abs().max()) < 5e-6, key


@pytest.mark.slow
def test_the_command_goes_on_from_tensor_parallelism(tmp_path: Path) -> None:
    """``--tp_size 2`` on two processes, then on two copies of two, then one process."""
    task = menu_task(num_train=1, num_heldout=1)
    task.model.save_pretrained(tmp_path / "model")
    task.tokenizer.save_pretrained(tmp_path / "model")
    rows = [
        {"prompt": r.prompt, "responses": r.responses, "scores": r.scores}
        for r in menu_records(40, seed=9)
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def command(run: str, steps: int, *more: str) -> list[str]:
        options = {
            **{"model": tmp_path / "model", "data": data, "output_dir": tmp_path / run},
            **{"max_steps": steps, "save_steps": 1, "logging_steps": 1, "groups_per_step": 8},
            **{"lr_scheduler_type": "constant", "learning_rate": 1e-3, "eval_strategy": "no"},
            **{"eval_groups": 4, "resume_from_checkpoint": "auto", "disable_tqdm": "true"},
        }
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        return ["train", *words, *more]

    def losses(run: str) -> list[float]:
        rows = read_metrics(tmp_path / run / "metrics.jsonl")
        return [row[key] for row in rows if "grad_norm" in row for key in ("loss", "grad_norm")]

    script = str(Path(forced_command.__file__))
    for processes, last in ((2, 2), (4, 4)):
        torchrun(processes, script, "tensor parallel", *command("run", last, "--tp_size", "2"))
    torch.set_num_threads(1)
    assert main(command("run", 5)) == main(command("whole", 5)) == 0
    assert len(losses("run")) == 10
    assert losses("run") == pytest.approx(losses("whole"), rel=2e-5)


def test_state_that_another_engine_wrote_is_refused_by_name(
    make_trainer: Callable[..., RankTrainer], menu_groups: list[Group], monkeypatch: Any
) -> None:
    make_trainer(menu_groups, max_steps=1, save_steps=1, save_strategy="steps").train()
    again = make_trainer(menu_groups, max_steps=1)
    written = "DeepSpeed ZeRO-2 on 2 process(es)"
    monkeypatch.setattr(RankTrainer, "_state_kind", written)
    with pytest.raises(InputError, match=r"checkpoint-1 holds its state as whole tensors") as error:
        again.train(resume_from_checkpoint=True)
    assert written in str(error.value) and "\n" not in str(error.value)
