"""A training run with a loss of one's own is that of the library's loss of the same formula."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import own_losses
import pytest
from trainer_runs import assert_same_weights, step_logs

from fastrank.cli.main import main
from fastrank.data.group import Group
from fastrank.errors import InputError
from fastrank.function_loss import FunctionLoss
from fastrank.losses import PRO, RRHF
from fastrank.training.config import RankConfig

FILE = own_losses.__file__
KWARGS = {"sft_weight": 1.0}
OWN: dict[str, dict[str, Any]] = {
    "function": {"loss": own_losses.rrhf, "loss_kwargs": KWARGS},
    "batched": {"loss": FunctionLoss(own_losses.batched_rrhf, sft_weight=1.0)},
    "file": {"loss": f"{FILE}:rrhf", "loss_kwargs": KWARGS, "backprop": "two_phase"},
    "a loss": {"loss": RRHF()},
    "a loss in a file": {"loss": f"{FILE}:LOSS"},
}


@pytest.mark.parametrize("own", OWN)
def test_a_run_is_that_of_rrhf(
    make_trainer: Callable[..., Any], ragged_groups: list[Group], own: str
) -> None:
    options = {"optim": "sgd", "learning_rate": 0.05, "max_steps": 4, "max_tokens": 75}
    options["backprop"] = OWN[own].get("backprop", "joint")
    runs = [
        make_trainer(ragged_groups, **options | extra) for extra in ({"loss": "rrhf"}, OWN[own])
    ]
    for run in runs:
        run.train()
    library, found = (step_logs(run) for run in runs)
    assert len(found) == 4 and found[0]["rank_loss"] > 0
    for row, expected in zip(found, library, strict=True):
        assert row.keys() == expected.keys()
        for key in row.keys() - {"tokens_per_second"}:
            assert row[key] == pytest.approx(expected[key], rel=1e-6, abs=1e-6), key
    assert_same_weights(runs[1], runs[0], atol=1e-6)


def test_a_function_without_a_name_survives_a_checkpoint(
    make_trainer: Callable[..., Any], ragged_groups: list[Group], tmp_path: Path
) -> None:
    options = {
        "max_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "output_dir": str(tmp_path),
    }
    make_trainer(ragged_groups, loss=lambda s, r: own_losses.rrhf(s, r), **options).train()
    assert (tmp_path / "checkpoint-2").is_dir()


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for number, loss in enumerate(
        (["rrhf"], [f"{FILE}:rrhf", "--loss_kwargs", json.dumps(KWARGS)])
    ):
        run = tmp_path / str(number)
        arguments = ["train", "--output_dir", str(run), "--max_steps", "3", "--loss", *loss]
        arguments += ["--logging_steps", "1", "--disable_tqdm", "true", "--eval_groups", "8"]
        assert main([*arguments, "--save_strategy", "no", "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out.splitlines()[-1])["after"]["eval"])
    assert found[1].keys() == found[0].keys()
    for key in ("loss", "rank_loss", "rewards/margins"):
        assert found[1][key] == pytest.approx(found[0][key], rel=1e-5), key


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        (f"{FILE}:nothing", "own_losses.py: no function 'nothing' in it"),
        (f"{FILE}:a b", "loss must be FILE.py:function, got"),
        ("missing.py:rrhf", "missing.py: no such loss file"),
        (PRO, None),
        (3, "loss must be a fastrank loss .* or a function of scores and rewards, got int"),
    ],
)
def test_what_is_no_loss_is_one_line(loss: Any, text: str | None) -> None:
    if text is None:  # a class is the loss with its defaults
        assert RankConfig(loss=loss, use_cpu=True, report_to=[]).ranking_loss == loss()
        return
    with pytest.raises(InputError, match=text):
        RankConfig(loss=loss, use_cpu=True, report_to=[])


def test_an_error_in_the_function_names_its_line(
    make_trainer: Callable[..., Any], ragged_groups: list[Group]
) -> None:
    run = make_trainer(ragged_groups, loss=f"{FILE}:forgetful", max_steps=1)
    with pytest.raises(
        InputError, match=r"own_losses.py:forgetful raised KeyError: .* \(line 32\)"
    ):
        run.train()
