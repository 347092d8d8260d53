"""Damaged checkpoints: never loaded, always passed over for the one before."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from damaging import DAMAGES, damage_file
from trainer_runs import assert_same_weights

from fastrank.data.group import Group
from fastrank.errors import InputError
from fastrank.training import checkpoint

Make = Callable[..., Any]

OPTIONS = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
FILES = (
    *("README.md", "checkpoint_files.json", "config.json", "generation_config.json"),
    *("model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json"),
    "training_args.json",
)


@pytest.fixture
def whole(make_trainer: Make, menu_groups: list[Group]) -> Any:
    """A finished run with checkpoints 1 to 3."""
    trainer = make_trainer(menu_groups, **OPTIONS)
    trainer.train()
    return trainer


def _kept(run: Path) -> Iterator[tuple[Path, str, str]]:
    """Every file of the run's last checkpoint with every damage, put right again afterwards."""
    folder = run / "checkpoint-3"
    assert sorted(file.name for file in folder.iterdir()) == sorted(FILES)
    for name in FILES:
        content = (folder / name).read_bytes()
        for kind in DAMAGES:
            damage_file(folder / name, kind)
            yield folder, name, kind
            (folder / name).write_bytes(content)


def test_no_damage_to_any_file_goes_unseen(whole: Any, tmp_path: Path, caplog: Any) -> None:
    run = tmp_path / "run"
    seen = 0
    for folder, name, kind in _kept(run):
        assert checkpoint.damage(folder), f"{name}: {kind}"
        with pytest.raises(InputError, match=r"checkpoint-3 cannot be used: .*"):
            checkpoint.resolve_resume(str(folder), run)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert checkpoint.latest_checkpoint(run) == run / "checkpoint-2"
        assert len(caplog.messages) == 1 and "\n" not in caplog.messages[0]
        seen += 1
    assert seen >= 150
    assert checkpoint.latest_checkpoint(run) == run / "checkpoint-3"


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    whole: Any, make_trainer: Make, menu_groups: list[Group], tmp_path: Path, capsys: Any
) -> None:
    run = tmp_path / "run"
    damage_file(run / "checkpoint-3" / "optimizer.pt", "bit at 0.50")
    damage_file(run / "checkpoint-2" / "model.safetensors", "swapped bytes")
    again = make_trainer(menu_groups, **OPTIONS)
    again.train(resume_from_checkpoint=True)
    assert f"resuming from {run / 'checkpoint-1'}\n" in capsys.readouterr().out
    assert_same_weights(again, whole)
    assert all(checkpoint.damage(path) is None for path in checkpoint.find_checkpoints(run))


@pytest.mark.slow
def test_every_damage_ends_in_the_same_bits(
    whole: Any, make_trainer: Make, menu_groups: list[Group], tmp_path: Path
) -> None:
    """The whole matrix through a resumed run, in a folder of its own."""
    ends = 0
    for folder, name, kind in _kept(tmp_path / "run"):
        run = tmp_path / "resumed"
        shutil.copytree(folder.parent, run)
        again = make_trainer(menu_groups, output_dir=str(run), **OPTIONS)
        again.train(resume_from_checkpoint=True)
        assert again.state.global_step == 3, f"{name}: {kind}"
        assert_same_weights(again, whole)
        assert [path.name for path in checkpoint.find_checkpoints(run)] == [
            f"checkpoint-{step}" for step in (1, 2, 3)
        ]
        shutil.rmtree(run)
        ends += 1
    assert ends >= 150
