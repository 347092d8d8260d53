"""A loss or gradient that is not finite: stopped or skipped, named, and never in a weight."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faults import Inject, clean_groups, poison, rule_out, spoil_gradients, spoil_scores
from trainer_runs import assert_same_values, assert_same_weights, step_logs
from transformers import AutoModelForCausalLM

from fastrank.data.group import Group
from fastrank.errors import TrainingStopped
from fastrank.training.checkpoint import latest_checkpoint
from fastrank.training.engine import Engine
from fastrank.training.guards import FiniteGuard

Make = Callable[..., Any]
BOTH = pytest.mark.parametrize("inject", [spoil_scores, spoil_gradients])
CLIPPED = pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])


@BOTH
@CLIPPED
def test_stop_names_the_records_and_keeps_the_weights(
    make_trainer: Make,
    menu_groups: list[Group],
    tmp_path: Path,
    inject: Inject,
    max_grad_norm: float,
) -> None:
    groups = clean_groups(menu_groups)
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "max_tokens": 120}
    probe = make_trainer(groups, **options)
    second_step = list(probe.get_train_dataloader().batch_sampler)[1]
    bad = sorted(second_step[2:4])
    trainer = make_trainer(poison(groups, bad), max_grad_norm=max_grad_norm, **options)
    inject(trainer.model)
    with pytest.raises(TrainingStopped) as caught:
        trainer.train()
    text = str(caught.value)
    assert "not finite in step 2" in text and "2 of the step's 8 records" in text
    assert all(f"menu:{i}" in text for i in bad)
    assert not any(f"menu:{i}," in text for i in range(24) if i not in bad)
    assert "--nonfinite skip" in text and "\n" not in text
    latest = latest_checkpoint(tmp_path / "run")
    assert latest is not None and latest.name == "checkpoint-1"
    assert_same_weights(AutoModelForCausalLM.from_pretrained(latest), trainer)


@BOTH
@CLIPPED
def test_skip_leaves_out_the_records_and_counts_them(
    make_trainer: Make,
    menu_groups: list[Group],
    inject: Inject,
    max_grad_norm: float,
) -> None:
    """Three steps with two bad records are three steps over the others."""
    groups = clean_groups(menu_groups)
    options = {"max_steps": 3, "max_grad_norm": max_grad_norm, "optim": "sgd", "learning_rate": 0.1}
    probe = make_trainer(groups, **options)
    steps = list(probe.get_train_dataloader().batch_sampler)
    bad = {1: steps[1][2:4]}
    trainer = make_trainer(poison(groups, bad[1]), nonfinite="skip", **options)
    inject(trainer.model)
    trainer.train()
    rows = step_logs(trainer)
    assert [row.get("skipped_records") for row in rows] == [None, 2.0, None]

    clean = make_trainer(groups, **options)

    class Reduced:
        """The same steps without the two."""

        def __len__(self) -> int:
            return 3

        def __iter__(self) -> Any:
            return iter([[i for i in s if i not in bad.get(n, [])] for n, s in enumerate(steps)])

        def set_epoch(self, epoch: int) -> None:
            pass

    loader = clean.get_train_dataloader()
    object.__setattr__(loader, "batch_sampler", Reduced())
    clean.get_train_dataloader = lambda: loader
    clean.train()
    expected = step_logs(clean)
    for key in ("loss", "rank_loss", "grad_norm", "rewards/margins"):
        assert [row[key] for row in rows] == pytest.approx([row[key] for row in expected], rel=1e-5)
    assert_same_weights(trainer, clean, atol=1e-6, rtol=1e-5)


def test_a_step_of_bad_records_alone_changes_nothing(
    make_trainer: Make, menu_groups: list[Group]
) -> None:
    groups = poison(clean_groups(menu_groups), list(range(24)))
    trainer = make_trainer(groups, nonfinite="skip", max_steps=3)
    spoil_scores(trainer.model)
    before = copy.deepcopy(trainer.model)
    trainer.train()
    rows = step_logs(trainer)
    assert [row["skipped_records"] for row in rows] == [8.0, 8.0, 8.0]
    assert [row["loss"] for row in rows] == [0.0, 0.0, 0.0]
    assert_same_weights(before, trainer)


def test_finite_runs_are_not_touched(make_trainer: Make, menu_groups: list[Group]) -> None:
    stop, skip = (make_trainer(menu_groups, nonfinite=mode) for mode in ("stop", "skip"))
    stop.train()
    skip.train()
    assert_same_weights(skip, stop)
    assert not any("skipped_records" in row for row in skip.state.log_history)


def test_weights_that_are_not_finite_are_blamed_first(
    make_trainer: Make, menu_groups: list[Group]
) -> None:
    trainer = make_trainer(menu_groups, nonfinite="skip")
    with torch.no_grad():
        trainer.model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(TrainingStopped, match="weights are not finite after step 0.*lm_head"):
        trainer.train()


def test_an_evaluation_names_or_leaves_out_bad_records(
    make_trainer: Make, menu_groups: list[Group]
) -> None:
    clean = clean_groups(menu_groups)
    groups = poison(clean, [3, 20])
    stopping = make_trainer(clean, groups, max_tokens=120)
    spoil_scores(stopping.model)
    with pytest.raises(TrainingStopped, match=r"menu:3, menu:20 \(2 of 24 records\)"):
        stopping.evaluate()
    skipping = make_trainer(clean, groups, max_tokens=120, nonfinite="skip")
    spoil_scores(skipping.model)
    values = skipping.evaluate()
    assert values["eval_skipped_records"] == 2.0
    rest = [group for i, group in enumerate(groups) if i not in (3, 20)]
    assert_same_values(values, make_trainer(clean, rest).evaluate(), rel=1e-5)


@pytest.mark.parametrize("backprop", ["joint", "two_phase"])
def test_a_candidate_that_the_model_rules_out_may_lose_but_not_win(
    make_trainer: Make, menu_groups: list[Group], backprop: str
) -> None:
    """A score of -inf has no part in RRHF's loss where the candidate is the worst; where it is the
    best the loss is infinite, and only that record is at fault."""

    def rewarded(group: Group, reward: float) -> Group:
        rewards = group.rewards.clone()
        rewards[0] = reward
        return replace(group, rewards=rewards)

    clean = clean_groups(menu_groups)
    groups = poison(clean, [3, 5])
    groups[3], groups[5] = rewarded(groups[3], -9.0), rewarded(groups[5], -9.0)
    options = {"backprop": backprop, "max_steps": 3, "per_device_train_batch_size": 24}
    trainer = make_trainer(groups, groups, loss="rrhf", **options)
    rule_out(trainer.model)
    trainer.train()
    rows = step_logs(trainer)
    assert [row["loss"] < float("inf") for row in rows] == [True] * 3
    assert all("rewards/accuracies" in row and "rewards/rejected" not in row for row in rows)
    values = trainer.evaluate()
    assert "eval_skipped_records" not in values and 0 < values["eval_rank_loss"] < 100
    assert trainer.evaluation_loop(trainer.get_eval_dataloader(), "").predictions[3][0] == -np.inf

    groups[5] = rewarded(groups[5], 9.0)
    losing = make_trainer(groups, groups, loss="rrhf", **options)
    rule_out(losing.model)
    with pytest.raises(TrainingStopped, match=r"menu:5 \(1 of the step's 24 records\)"):
        losing.train()
    with pytest.raises(TrainingStopped, match=r"menu:5 \(1 of 24 records\)"):
        losing.evaluate()


def test_a_guard_that_looks_too_late_promises_nothing(tmp_path: Path) -> None:
    """DeepSpeed's backward pass changes the weights."""
    for looks_first in (True, False):
        guard = FiniteGuard(Engine(), tmp_path, looks_first)
        step = guard.step_message(3, ["data:1"], 8)
        assert ("the weights are as before the step" in step) == looks_first
        assert ("DeepSpeed has changed the weights by it" in step) != looks_first
        for message in (step, guard.evaluation_message(3, ["data:1"], 8)):
            assert ("--nonfinite skip" in message) == looks_first
            assert "data:1" in message and "; remove the" in message
