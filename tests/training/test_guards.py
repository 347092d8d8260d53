"""A loss or gradient that is not finite: stopped or skipped, named, and never in a weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_gradients import InfiniteGradient
from transformers import AutoModelForCausalLM

from fastrank.data.group import Group
from fastrank.errors import TrainingStopped
from fastrank.training.checkpoint import latest_checkpoint

Make = Callable[..., Any]
TRIGGER = 31  # a word that no menu of these tests has


def _without_trigger(groups: list[Group]) -> list[Group]:
    clean = [
        g for g in groups if all(TRIGGER not in ids for ids in (g.prompt_ids, *g.response_ids))
    ]
    return [replace(group, name=f"menu:{i}") for i, group in enumerate(clean)][:24]


def _poison(groups: list[Group], positions: list[int]) -> list[Group]:
    poisoned = list(groups)
    for i in positions:
        first, *rest = poisoned[i].response_ids
        poisoned[i] = replace(
            poisoned[i], response_ids=(torch.cat((torch.tensor([TRIGGER]), first)), *rest)
        )
    return poisoned


def _bad_forward(trainer: Any) -> None:
    """Hidden rows of the trigger become NaN: the scores show it."""

    def hook(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        hit = (inputs[0] == TRIGGER)[..., None]
        return torch.where(hit, torch.full_like(output, float("nan")), output)

    trainer.model.get_input_embeddings().register_forward_hook(hook)


def _bad_backward(trainer: Any) -> None:
    """Losses and scores stay good; the gradient of the trigger's row is infinite."""

    def hook(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return InfiniteGradient.apply(output, (inputs[0] == TRIGGER)[..., None])

    trainer.model.get_input_embeddings().register_forward_hook(hook)


BOTH = pytest.mark.parametrize("inject", [_bad_forward, _bad_backward])
CLIPPED = pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])


@BOTH
@CLIPPED
def test_stop_names_the_records_and_keeps_the_weights(
    make_trainer: Make,
    menu_groups: list[Group],
    tmp_path: Path,
    inject: Callable[[Any], None],
    max_grad_norm: float,
) -> None:
    groups = _without_trigger(menu_groups)
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "max_tokens": 120}
    probe = make_trainer(groups, **options)
    second_step = list(probe.get_train_dataloader().batch_sampler)[1]
    bad = sorted(second_step[2:4])
    trainer = make_trainer(_poison(groups, bad), max_grad_norm=max_grad_norm, **options)
    inject(trainer)
    with pytest.raises(TrainingStopped) as caught:
        trainer.train()
    text = str(caught.value)
    assert "not finite in step 2" in text and "2 of the step's 8 records" in text
    assert all(f"menu:{i}" in text for i in bad)
    assert not any(f"menu:{i}," in text for i in range(24) if i not in bad)
    assert "--nonfinite skip" in text and "\n" not in text
    latest = latest_checkpoint(tmp_path / "run")
    assert latest is not None and latest.name == "checkpoint-1"
    good = AutoModelForCausalLM.from_pretrained(latest).state_dict()
    for key, value in trainer.model.state_dict().items():
        assert torch.equal(good[key], value)


@BOTH
@CLIPPED
def test_skip_leaves_out_the_records_and_counts_them(
    make_trainer: Make,
    menu_groups: list[Group],
    inject: Callable[[Any], None],
    max_grad_norm: float,
) -> None:
    """Three steps with two bad records are three steps over the others."""
    groups = _without_trigger(menu_groups)
    options = {"max_steps": 3, "max_grad_norm": max_grad_norm, "optim": "sgd", "learning_rate": 0.1}
    probe = make_trainer(groups, **options)
    steps = list(probe.get_train_dataloader().batch_sampler)
    bad = {1: steps[1][2:4]}
    trainer = make_trainer(_poison(groups, bad[1]), nonfinite="skip", **options)
    inject(trainer)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "grad_norm" in row]
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
    expected = [row for row in clean.state.log_history if "grad_norm" in row]
    for key in ("loss", "rank_loss", "grad_norm", "rewards/margins"):
        assert [row[key] for row in rows] == pytest.approx([row[key] for row in expected], rel=1e-5)
    for key, value in clean.model.state_dict().items():
        torch.testing.assert_close(trainer.model.state_dict()[key], value, atol=1e-6, rtol=1e-5)


def test_a_step_of_bad_records_alone_changes_nothing(
    make_trainer: Make, menu_groups: list[Group]
) -> None:
    groups = _poison(_without_trigger(menu_groups), list(range(24)))
    trainer = make_trainer(groups, nonfinite="skip", max_steps=3)
    _bad_forward(trainer)
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    trainer.train()
    rows = [row for row in trainer.state.log_history if "grad_norm" in row]
    assert [row["skipped_records"] for row in rows] == [8.0, 8.0, 8.0]
    assert [row["loss"] for row in rows] == [0.0, 0.0, 0.0]
    for key, value in trainer.model.state_dict().items():
        assert torch.equal(before[key], value)


def test_finite_runs_are_not_touched(make_trainer: Make, menu_groups: list[Group]) -> None:
    stop, skip = (make_trainer(menu_groups, nonfinite=mode) for mode in ("stop", "skip"))
    stop.train()
    skip.train()
    for key, value in stop.model.state_dict().items():
        assert torch.equal(skip.model.state_dict()[key], value)
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
    clean = _without_trigger(menu_groups)
    groups = _poison(clean, [3, 20])
    stopping = make_trainer(clean, groups, max_tokens=120)
    _bad_forward(stopping)
    with pytest.raises(TrainingStopped, match=r"menu:3, menu:20 \(2 of 24 records\)"):
        stopping.evaluate()
    skipping = make_trainer(clean, groups, max_tokens=120, nonfinite="skip")
    _bad_forward(skipping)
    values = skipping.evaluate()
    assert values["eval_skipped_records"] == 2.0
    rest = [group for i, group in enumerate(groups) if i not in (3, 20)]
    expected = make_trainer(clean, rest).evaluate()
    for key in expected:
        if "runtime" not in key and "per_second" not in key:
            assert values[key] == pytest.approx(expected[key], rel=1e-5), key
