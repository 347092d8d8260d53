"""A run goes on with another engine and another number of processes, and is the same run."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forced_command
import pytest
import restarts
import torch
from menu_files import save_menu_model, write_menu
from torchrun import torchrun
from transformers import AutoModelForCausalLM

from fastrank.cli.main import main
from fastrank.data.group import Group
from fastrank.errors import InputError
from fastrank.training.callbacks import read_metrics
from fastrank.training.trainer import RankTrainer

without_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)


def _run(out: Path, processes: int, *stages: dict[str, Any]) -> list[Any]:
    """What the stages found, one after the other."""
    texts = [json.dumps({"name": f"{i}"} | stage) for i, stage in enumerate(stages)]
    torchrun(processes, str(Path(restarts.__file__)), str(out), *texts)
    return [torch.load(out / f"{i}.pt", weights_only=True) for i in range(len(stages))]


def _assert_same_run(got: Any, want: Any) -> None:
    assert [row["step"] for row in got["log"]] == list(range(1, len(want["log"]) + 1))
    assert got["steps"] == want["steps"] == [len(want["log"])] * 2
    for key in ("loss", "rank_loss", "grad_norm", "learning_rate"):
        values = [row[key] for row in got["log"]]
        expected = [row[key] for row in want["log"]]
        assert values == pytest.approx(expected, rel=1e-4, abs=1e-6), key
    for key, weight in want["weights"].items():
        assert float((got["weights"][key] - weight).abs().max()) < 5e-6, key


@pytest.mark.slow
def test_losses_and_weights_do_not_depend_on_engines_and_processes(tmp_path: Path) -> None:
    """DDP on two processes, FSDP2 on two, one process, FSDP2 on four: every one goes on from
    the checkpoint of the one before. Tied weights, which whole files hold once, and a buffer."""
    for engine, processes, last in [("ddp", 2, 2), ("fsdp2", 2, 4), ("ddp", 1, 6), ("fsdp2", 4, 8)]:
        (got,) = _run(tmp_path, processes, {"folder": "run", "engine": engine, "last": last})
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-8"]
    torch.set_num_threads(1)
    _assert_same_run(got, restarts.train(tmp_path / "whole", 8, use_cpu=True))


@pytest.mark.slow
def test_options_changed_under_fsdp2_take_effect_as_in_one_process(tmp_path: Path) -> None:
    changed = {"learning_rate": 3e-3, "weight_decay": 0.3, "adam_beta1": 0.5, "loss": "listnet"}
    allowed = [*changed, "optim"]
    stages = [
        {"last": 2},
        {"last": 4, **changed},
        {"last": 4, **changed, "resume_changed": list(changed)},
        {"last": 6, "optim": "sgd", **changed, "resume_changed": allowed},
    ]
    got = _run(tmp_path, 2, *({"folder": "run", "engine": "fsdp2"} | stage for stage in stages))
    assert "--resume_changed" in got[1] and "learning_rate=0.001, got 0.003" in got[1]
    torch.set_num_threads(1)
    for number in (0, 2, 3):
        _assert_same_run(
            got[number], restarts.train(tmp_path / "one", use_cpu=True, **stages[number])
        )


@pytest.mark.slow
@without_deepspeed
def test_zero_goes_on_bit_for_bit_and_nothing_else_reads_its_state(tmp_path: Path) -> None:
    kinds = {2: "DeepSpeed ZeRO-2 on 2 process(es)", 3: "DeepSpeed ZeRO-3 on 2 process(es)"}
    got = _run(
        tmp_path,
        2,
        *(
            {"folder": folder, "engine": f"zero{stage}", "last": last}
            for stage in kinds
            for folder, last in ((f"whole{stage}", 4), (f"cut{stage}", 2), (f"cut{stage}", 4))
        ),
        {"folder": "cut2", "engine": "zero3", "last": 5},
        {"folder": "cut3", "engine": "zero2", "last": 5},
        {"folder": "cut2", "engine": "fsdp2", "last": 5},
        {"folder": "cut3", "engine": "zero3", "last": 5, "learning_rate": 1.0,
         "resume_changed": ["learning_rate"]},
    )  # fmt: skip
    for whole, cut in ((got[0], got[2]), (got[3], got[5])):
        assert len(cut["log"]) == 4
        for row, expected in zip(cut["log"], whole["log"], strict=True):
            assert row | {"tokens_per_second": 0} == expected | {"tokens_per_second": 0}
        assert cut["steps"] == whole["steps"] == [4, 4]
        for key, weight in whole["weights"].items():
            assert torch.equal(cut["weights"][key], weight), key
    others = ((2, kinds[3]), (3, kinds[2]), (2, "whole tensors"))
    for refusal, (written, here) in zip(got[6:9], others, strict=True):
        assert f"holds its state as {kinds[written]}, which this run ({here})" in refusal
        assert f"--model {tmp_path}/cut{written}" in refusal and "\n" not in refusal
    assert "--resume_changed learning_rate: not possible under DeepSpeed" in got[9]
    # Its weights are whole: a new run begins with them.
    for stage, found in ((2, got[2]), (3, got[5])):
        (folder,) = (tmp_path / f"cut{stage}").glob("checkpoint-*")
        loaded = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
        for key, weight in found["weights"].items():
            assert torch.equal(loaded[key], weight), key


@pytest.mark.slow
def test_the_command_goes_on_from_tensor_parallelism(tmp_path: Path) -> None:
    """``--tp_size 2`` on two processes, then on two copies of two, then one process."""
    save_menu_model(tmp_path / "model")
    data = write_menu(tmp_path / "data.jsonl", 40, seed=9)

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
