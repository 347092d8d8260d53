"""Checkpoints: whole or not there, found again, and exact to resume from."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers.trainer
from damaging import damage_file
from holders import another_holder
from trainer_runs import assert_same_weights
from transformers import AutoModelForCausalLM, LlamaForCausalLM, TrainerCallback

from fastrank.data.group import Group
from fastrank.data.locks import LOCK_FILE
from fastrank.errors import InputError, TrainingStopped
from fastrank.tasks.menu import tiny_llama
from fastrank.training import checkpoint
from fastrank.training.callbacks import MetricsFile, read_metrics

Make = Callable[..., Any]


def _publish(run: Path, step: int, **plan: Any) -> Path:
    staged = checkpoint.begin_staging(run, ".staging-x") / checkpoint.checkpoint_name(step)
    (staged / "inner").mkdir(parents=True)
    (staged / "trainer_state.json").write_text("{}")
    (staged / "inner" / "weights").write_bytes(b"0123456789" * step)
    final = checkpoint.publish(staged, run, plan, {"note": step})
    checkpoint.clean_staging(run, ".staging-x")
    return final


def test_the_latest_whole_checkpoint_is_found(tmp_path: Path, caplog: Any) -> None:
    assert checkpoint.latest_checkpoint(tmp_path / "none") is None
    for step in (9, 10, 100):
        _publish(tmp_path, step)
    assert [p.name for p in checkpoint.find_checkpoints(tmp_path)] == [
        "checkpoint-9",
        "checkpoint-10",
        "checkpoint-100",
    ]
    assert checkpoint.latest_checkpoint(tmp_path) == tmp_path / "checkpoint-100"
    assert not caplog.records


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: (path / "inner" / "weights").write_bytes(b"01"), "has 2 bytes instead of 30"),
        (lambda path: (path / "inner" / "weights").unlink(), "inner/weights is missing"),
        (lambda path: (path / checkpoint.MANIFEST).unlink(), "it was not written to its end"),
        (lambda path: (path / checkpoint.MANIFEST).write_text('{"fil'), "no readable"),
        (lambda path: damage_file(path / "inner" / "weights", "swapped bytes"), "not those that"),
        (lambda path: damage_file(path / checkpoint.MANIFEST, "bit at 0.50"), "no readable"),
    ],
)
def test_a_broken_checkpoint_is_skipped_with_a_warning(
    tmp_path: Path, caplog: Any, damage: Callable[[Path], Any], reason: str
) -> None:
    _publish(tmp_path, 2)
    broken = _publish(tmp_path, 3)
    damage(broken)
    with caplog.at_level(logging.WARNING):
        assert checkpoint.latest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert "checkpoint-3 is skipped" in caplog.text and reason in caplog.text
    with pytest.raises(InputError, match="checkpoint-3 cannot be used"):
        checkpoint.resolve_resume(str(broken), tmp_path)
    _publish(tmp_path, 3)  # the resumed run writes it again
    assert checkpoint.latest_checkpoint(tmp_path) == tmp_path / "checkpoint-3"


def test_what_resume_from_checkpoint_means(tmp_path: Path) -> None:
    path = _publish(tmp_path, 4)
    for nothing in (None, False, "false", "no", ""):
        assert checkpoint.resolve_resume(nothing, tmp_path) is None
    for latest in (True, "true", "True", "latest", "yes"):
        assert checkpoint.resolve_resume(latest, tmp_path) == path
        with pytest.raises(InputError, match="new holds no checkpoint to go on from; auto would"):
            checkpoint.resolve_resume(latest, tmp_path / "new")
    assert checkpoint.resolve_resume("auto", tmp_path) == path
    assert checkpoint.resolve_resume("auto", tmp_path / "new") is None
    assert checkpoint.resolve_resume(str(path), tmp_path / "new") == path
    with pytest.raises(InputError, match="is no folder; expected a checkpoint, true or auto"):
        checkpoint.resolve_resume(str(tmp_path / "checkpoint-5"), tmp_path)


def test_rotation_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        _publish(tmp_path, step)
    checkpoint.rotate(tmp_path, None)
    assert len(checkpoint.find_checkpoints(tmp_path)) == 4
    checkpoint.rotate(tmp_path, 2, keep=str(tmp_path / "checkpoint-1"))
    assert [p.name for p in checkpoint.find_checkpoints(tmp_path)] == [
        "checkpoint-1",
        "checkpoint-4",
    ]
    checkpoint.rotate(tmp_path, 1)
    assert [p.name for p in checkpoint.find_checkpoints(tmp_path)] == ["checkpoint-4"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-4"]


# ---- with a trainer --------------------------------------------------------------------------


class _Stop(Exception):
    pass


class _StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise _Stop


def _losses(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    keys = ("step", "loss", "rank_loss", "grad_norm", "learning_rate", "rewards/margins")
    return [tuple(row[k] for k in keys) for row in rows if "grad_norm" in row]


@pytest.mark.parametrize(
    ("options", "stops"),
    [({"max_steps": 10}, (4, 9)), ({"max_steps": -1, "num_train_epochs": 2}, (6,))],
)
def test_resuming_is_exact(
    make_trainer: Make, menu_groups: list[Group], tmp_path: Path, options: Any, stops: Any
) -> None:
    """Stopped before, at and after the end of an epoch of 6 steps, with AdamW and its schedule."""

    def run(name: str, resume: bool | str, *callbacks: TrainerCallback) -> Any:
        out = tmp_path / name
        trainer = make_trainer(
            menu_groups,
            output_dir=str(out),
            save_strategy="steps",
            save_steps=3,
            warmup_steps=2,
            callbacks=[MetricsFile(out), *callbacks],
            **options,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run("whole", False)
    for stop in stops:
        with pytest.raises(_Stop):
            run("cut", "auto", _StopAt(stop))  # at first there is nothing to resume from: it begins
    resumed = run("cut", True)
    assert resumed.state.global_step == whole.state.global_step
    assert_same_weights(resumed, whole)
    rows = read_metrics(tmp_path / "cut" / "metrics.jsonl")
    assert _losses(rows) == _losses(read_metrics(tmp_path / "whole" / "metrics.jsonl"))


def test_resuming_a_finished_run_trains_no_further(
    make_trainer: Make, menu_groups: list[Group]
) -> None:
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 4}
    first = make_trainer(menu_groups, **options)
    first.train()
    again = make_trainer(menu_groups, **options)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4
    assert_same_weights(again, first)


def test_a_tied_head_is_not_said_to_be_missing(
    make_trainer: Make, menu_groups: list[Group], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is saved once, under the name of the embeddings; what is really missing is still said."""
    said: list[str] = []
    monkeypatch.setattr(transformers.trainer.logger, "warning", said.append)

    def tied() -> Any:
        config = tiny_llama(0).config
        config.tie_word_embeddings = True
        return LlamaForCausalLM(config)

    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    make_trainer(menu_groups[:8], model=tied(), **options).train()
    again = make_trainer(menu_groups[:8], model=tied(), **options)
    again.train(resume_from_checkpoint=True)
    assert not [line for line in said if "missing" in line]
    lost = SimpleNamespace(missing_keys=["lm_head.weight", "model.norm.weight"], unexpected_keys=[])
    lost._replace = lambda missing_keys: SimpleNamespace(
        missing_keys=missing_keys, unexpected_keys=[]
    )
    again._issue_warnings_after_load(lost)
    (line,) = [line for line in said if "missing" in line]
    assert "model.norm.weight" in line and "lm_head" not in line


def test_resuming_with_other_steps_is_refused(make_trainer: Make, menu_groups: list[Group]) -> None:
    make_trainer(menu_groups, save_strategy="steps", save_steps=2).train()
    other = make_trainer(menu_groups, per_device_train_batch_size=4)
    with pytest.raises(InputError, match="groups_per_step=8, got 4"):
        other.train(resume_from_checkpoint=True)


def test_a_checkpoint_is_never_seen_half_written(
    make_trainer: Make, menu_groups: list[Group], tmp_path: Path, monkeypatch: Any
) -> None:
    """Whatever stage of saving is cut, the folder with the name is not there yet."""
    seen: list[str] = []
    real = checkpoint.publish

    def watching(staged: Path, run_dir: Path, *rest: Any) -> Path:
        seen.extend(p.name for p in checkpoint.find_checkpoints(run_dir))
        assert (staged / "optimizer.pt").is_file() and (staged / "model.safetensors").is_file()
        assert (staged / "trainer_state.json").is_file()
        return real(staged, run_dir, *rest)

    monkeypatch.setattr(checkpoint, "publish", watching)
    trainer = make_trainer(menu_groups, max_steps=3, save_strategy="steps", save_steps=1)
    trainer.train()
    assert seen == ["checkpoint-1", "checkpoint-1", "checkpoint-2"]
    for path in checkpoint.find_checkpoints(tmp_path / "run"):
        assert checkpoint.damage(path) is None
        assert not (path / "training_args.bin").exists()
    assert not list((tmp_path / "run").glob(".*"))


def test_the_best_checkpoint_has_its_final_path(
    make_trainer: Make, menu_groups: list[Group], tmp_path: Path
) -> None:
    trainer = make_trainer(
        menu_groups,
        menu_groups[:6],
        max_steps=4,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.parent == tmp_path / "run" and best.is_dir()
    state = json.loads((best / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(best)
    loaded = AutoModelForCausalLM.from_pretrained(best)
    assert_same_weights(loaded, trainer)


def test_spoilt_weights_are_not_saved(
    make_trainer: Make, menu_groups: list[Group], tmp_path: Path
) -> None:
    class Spoil(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                with torch.no_grad():
                    kwargs["model"].lm_head.weight[3, 3] = float("inf")

    trainer = make_trainer(
        menu_groups, save_strategy="steps", save_steps=1, callbacks=[Spoil()], max_steps=3
    )
    with pytest.raises(TrainingStopped, match=r"1 weights are not finite after step 2 .*lm_head"):
        trainer.train()
    latest = checkpoint.latest_checkpoint(tmp_path / "run")
    assert latest is not None and latest.name == "checkpoint-1"
    model = AutoModelForCausalLM.from_pretrained(latest)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    with pytest.raises(TrainingStopped, match="not finite"):
        trainer.save_model()
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_a_failing_disk_leaves_the_last_good_checkpoint(
    make_trainer: Make, menu_groups: list[Group], tmp_path: Path, monkeypatch: Any
) -> None:
    """The second save meets ENOSPC half-way, after real files were staged."""
    real = torch.save

    def full(value: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        if "checkpoint-2" in str(path) and str(path).endswith("optimizer.pt"):
            real(value, path, *args, **kwargs)
            raise OSError(28, "No space left on device")
        real(value, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    trainer = make_trainer(menu_groups, save_strategy="steps", save_steps=1)
    with pytest.raises(TrainingStopped) as caught:
        trainer.train()
    text = str(caught.value)
    assert "checkpoint-2 could not be saved" in text and "no space left on the device" in text
    assert "the last good checkpoint is" in text and "checkpoint-1" in text and "\n" not in text
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["checkpoint-1"]
    monkeypatch.setattr(torch, "save", real)
    again = make_trainer(menu_groups, save_strategy="steps", save_steps=1)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4


@pytest.mark.parametrize("limit", [100_000, 400_000], ids=["weights", "optimizer"])
def test_a_write_that_really_fails(
    make_trainer: Make, menu_groups: list[Group], tmp_path: Path, limit: int
) -> None:
    """The kernel refuses bytes beyond a limit: in the safetensors file, or in torch's archive."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Limit(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))

    options = {"save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(menu_groups, callbacks=[Limit()], **options)
    try:
        with pytest.raises(TrainingStopped) as caught:
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "checkpoint-2 could not be saved" in str(caught.value)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["checkpoint-1"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-1")
    again = make_trainer(menu_groups, **options)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4


class _Payload:
    """Unpickled, it would leave a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_can_execute_nothing(
    make_trainer: Make, menu_groups: list[Group], tmp_path: Path, name: str
) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 3}
    make_trainer(menu_groups, **options).train()
    folder = tmp_path / "run" / "checkpoint-2"
    torch.save(_Payload(tmp_path / "executed"), folder / name)
    (folder / "training_args.bin").write_bytes(pickle.dumps(_Payload(tmp_path / "executed")))
    manifest = checkpoint.read_manifest(folder)
    assert manifest is not None
    checkpoint.write_manifest(folder, manifest["plan"], manifest["notes"])  # a forgery
    shutil.rmtree(tmp_path / "run" / "checkpoint-3")
    with pytest.raises(InputError, match=f"checkpoint-2 cannot be loaded: .*{name}") as caught:
        make_trainer(menu_groups, **options).train(resume_from_checkpoint=True)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()


def test_a_run_does_not_go_on_without_its_optimizer(
    make_trainer: Make, menu_groups: list[Group], tmp_path: Path
) -> None:
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    make_trainer(menu_groups, save_only_model=True, **options).train()
    match = "checkpoint-2 holds the model alone .* begin a new run with --model .*checkpoint-2$"
    for only_model in (True, False):
        trainer = make_trainer(menu_groups, save_only_model=only_model, **options)
        with pytest.raises(InputError, match=match):
            trainer.train(resume_from_checkpoint=True)


def test_runs_leave_the_staging_folders_of_others_alone(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    mine, others = (checkpoint.new_staging_name() for _ in range(2))
    dead = others.replace(f"-{os.getpid()}-", f"-{ended.pid}-")
    elsewhere = dead.replace(socket.gethostname(), "another_host")
    for name in (mine, others, dead, elsewhere):
        (tmp_path / name / "half").mkdir(parents=True)
    staging = checkpoint.begin_staging(tmp_path, mine)
    assert list(staging.iterdir()) == []
    found = {path.name for path in tmp_path.iterdir()}
    assert found == {mine, others, elsewhere}
    checkpoint.clean_staging(tmp_path, mine)
    assert {path.name for path in tmp_path.iterdir()} == {others, elsewhere}
    checkpoint.remove_remains(tmp_path, alone=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_folder_that_another_run_writes_is_left_alone(
    make_trainer: Make, menu_groups: list[Group], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    trainer = make_trainer(menu_groups, max_steps=1, save_strategy="steps", save_steps=1)
    (run / ".staging-elsewhere-1-00").mkdir(parents=True)
    with another_holder(run / LOCK_FILE) as pid:
        with pytest.raises(InputError, match=f"output_dir .*another run: process {pid} on"):
            trainer.train()
        assert {path.name for path in run.iterdir()} == {LOCK_FILE, ".staging-elsewhere-1-00"}
    trainer.train()
    assert [path.name for path in run.iterdir()] == ["checkpoint-1"]


def test_leftovers_of_a_kill_are_removed(
    make_trainer: Make, menu_groups: list[Group], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for name in (".staging-x/checkpoint-3", ".discarded/checkpoint-1"):
        (run / name).mkdir(parents=True)
        (run / name / "optimizer.pt").write_bytes(b"half")
    make_trainer(menu_groups, max_steps=1).train()
    assert [p.name for p in run.iterdir()] == []
    shutil.rmtree(run)
