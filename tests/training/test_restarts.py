"""A run goes on with another engine and another number of processes, and is the same run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import restarts
import torch
from torchrun import torchrun

from fastrank.data.group import Group
from fastrank.errors import InputError
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
