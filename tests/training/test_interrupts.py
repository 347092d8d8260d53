"""Ctrl-C and SIGTERM: a whole step, a checkpoint, and a resumed run that is the same run."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trainer_runs import assert_same_weights, step_logs
from transformers import TrainerCallback

from fastrank.cli.main import main
from fastrank.data.group import Group
from fastrank.errors import TrainingInterrupted
from fastrank.training import checkpoint, interrupts

Make = Callable[..., Any]

#: Of 24 groups: 3 steps per epoch.
OPTIONS = {"max_steps": 7, "logging_steps": 1}
TIMED = ("tokens_per_second", "runtime", "per_second", "total_flos")


class Sends(TrainerCallback):
    """Sends signals to this process in the events named, at a step."""

    def __init__(self, step: int, *signals: int, event: str = "on_step_begin") -> None:
        self.step, self.signals = step, signals
        setattr(self, event, self._send)

    def _send(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            for number in self.signals:
                signal.raise_signal(number)


def _rows(trainer: Any) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in row.items() if not any(word in key for word in TIMED)}
        for row in trainer.state.log_history
        if "train_runtime" not in row
    ]


@pytest.mark.parametrize(
    ("step", "options"),
    [
        (1, {}),
        (1, {"save_strategy": "epoch", "eval_strategy": "epoch"}),
        (2, {"save_strategy": "epoch", "eval_strategy": "epoch"}),  # the last of its epoch
        (6, {"save_strategy": "epoch", "eval_strategy": "epoch"}),  # the last of all
        (
            4,
            {
                **{"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps"},
                **{"eval_steps": 2, "load_best_model_at_end": True, "save_total_limit": 1},
            },
        ),
        (
            3,  # whose evaluation, the second, would not save it
            {
                **{"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 2},
                **{"metric_for_best_model": "loss", "greater_is_better": True},
            },
        ),
        (1, {"save_strategy": "steps", "save_steps": 3, "save_only_model": True}),
    ],
)
def test_an_interrupted_run_goes_on_as_the_same_run(
    step: int,
    options: dict[str, Any],
    make_trainer: Make,
    menu_groups: list[Group],
    tmp_path: Path,
) -> None:
    """A signal within a step, and one after it: the next one is the last then, unless an epoch
    ends in between."""
    groups = menu_groups[:24]
    heldout = menu_groups[24:28] if "eval_strategy" in options else None
    options = OPTIONS | options
    whole = make_trainer(groups, heldout, output_dir=str(tmp_path / "whole"), **options)
    whole.train()
    before = [signal.getsignal(number) for number in interrupts.SIGNALS]
    for event in ("on_step_begin", "on_log"):
        run = tmp_path / event
        # Both at once are one request.
        sends = Sends(step, signal.SIGINT, signal.SIGTERM, event=event)
        first = make_trainer(groups, heldout, callbacks=[sends], output_dir=str(run), **options)
        with pytest.raises(TrainingInterrupted) as caught:
            first.train()
        assert before == [signal.getsignal(number) for number in interrupts.SIGNALS]
        at_end = event == "on_log" and step % 3 == 0
        last = step if at_end else step + 1
        saved = run / f"checkpoint-{last}"
        assert caught.value.checkpoint == saved and caught.value.signum == signal.SIGINT
        expected = f"interrupted (SIGINT) after step {last} of 7, which {saved} holds"
        assert str(caught.value) == expected
        assert checkpoint.damage(saved) is None and (saved / "optimizer.pt").is_file()
        assert first.args.save_total_limit == options.get("save_total_limit")
        again = make_trainer(groups, heldout, output_dir=str(run), **options)
        again.train(resume_from_checkpoint=True)
        assert len(step_logs(again)) == 7
        assert _rows(again) == _rows(whole)
        assert_same_weights(again, whole)


def test_a_second_signal_leaves_at_once(
    make_trainer: Make, menu_groups: list[Group], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interrupts, "_TOGETHER", 0.0)
    sends = Sends(2, signal.SIGINT, signal.SIGINT)
    trainer = make_trainer(menu_groups, callbacks=[sends], **OPTIONS)
    before = signal.getsignal(signal.SIGINT)  # ignored, if the tests run in the background
    with pytest.raises(KeyboardInterrupt) as caught:
        trainer.train()
    assert not isinstance(caught.value, TrainingInterrupted)
    assert trainer.state.global_step == 2 and not checkpoint.find_checkpoints(tmp_path / "run")
    assert signal.getsignal(signal.SIGINT) is before


def test_what_comes_after_the_last_step_goes_to_whoever_had_the_signal(
    make_trainer: Make, menu_groups: list[Group]
) -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        sends = Sends(2, signal.SIGTERM, event="on_train_end")
        trainer = make_trainer(menu_groups, callbacks=[sends], max_steps=2)
        trainer.train()
        assert heard == [signal.SIGTERM] and not trainer.interrupted
        signal.raise_signal(signal.SIGTERM)
        assert len(heard) == 2
    finally:
        signal.signal(signal.SIGTERM, before)


def test_signals_stay_as_they_are_beside_the_main_thread(
    make_trainer: Make, menu_groups: list[Group]
) -> None:
    found: list[Any] = []

    class Looks(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            found.append(signal.getsignal(signal.SIGINT))

    trainer = make_trainer(menu_groups, callbacks=[Looks()], max_steps=1)
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGINT)] and trainer.state.global_step == 1


def test_a_forked_child_leaves_ctrl_c_to_its_parent_and_ends_at_sigterm() -> None:
    with interrupts.Interruption(alone=True).watching(says=True):
        child = os.fork()
        if not child:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


def test_the_command_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/fastrank"])
    run = tmp_path / "a run"
    command = ["train", "--resume-from-checkpoint=no", "--output_dir", str(run)]
    command += ["--max_steps", "6", "--save_strategy", "no", "--eval_groups", "4", "--seed", "3"]
    command += ["--disable_tqdm", "true", "--logging_steps", "1"]
    main_thread = threading.main_thread().ident
    assert main_thread is not None

    def send() -> None:
        while not (run / "metrics.jsonl").exists() or '"grad_norm"' not in (
            run / "metrics.jsonl"
        ).read_text(encoding="utf-8"):
            time.sleep(0.001)
        signal.pthread_kill(main_thread, signal.SIGTERM)

    # The steps wait for the signal, so that it comes between the first and the last one.
    thread = threading.Thread(target=send)
    thread.start()
    step = checkpoint.checkpoint_name

    def slow(self: Any, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        time.sleep(0.05)

    monkeypatch.setattr(TrainerCallback, "on_step_begin", slow)
    assert main(command) == 128 + signal.SIGTERM
    thread.join()
    (found,) = checkpoint.find_checkpoints(run)
    number = found.name.rpartition("-")[2]
    assert found.name == step(int(number))
    said = capsys.readouterr().err.splitlines()[-1]
    going_on = [*command[:1], *command[2:], "--resume_from_checkpoint", "true"]
    assert said == (
        f"fastrank train: interrupted (SIGTERM) after step {number} of 6, which {found} holds; "
        "to go on: fastrank " + " ".join(f"'{a}'" if " " in a else a for a in going_on)
    )
    unfinished = {path.name for path in run.iterdir()}
    assert not unfinished & {"model.safetensors", "summary.json", ".lock"}
    assert main(going_on) == 0
    assert f"resuming from {found}" in capsys.readouterr().out
