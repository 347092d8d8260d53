"""Stages of runs that go on from their checkpoints, with one engine or with several.

``restarts.py OUT STAGE ...``: a stage is JSON, with the run's ``folder`` in OUT, the ``engine``,
the step ``last`` to train to, and other options. It goes on from the latest checkpoint of its
folder and saves after every step. What it finds, or why it was refused, is left in OUT by its
``name``.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from forced_engines import GLOBAL_BATCH, close_groups, force_engine, make_model, whole_weights
from transformers import TrainerCallback

from fastrank.errors import InputError
from fastrank.training.config import RankConfig
from fastrank.training.trainer import RankTrainer


class CountSteps(TrainerCallback):
    """Counts steps in a buffer of the model, which is a part of its state."""

    def on_step_end(self, *args: Any, model: Any, **kwargs: Any) -> None:
        model.model.norm.steps += 1


def train(folder: Path, last: int, **options: Any) -> dict[str, Any]:
    options = {"learning_rate": 1e-3} | options
    config = RankConfig(
        output_dir=str(folder),
        groups_per_step=GLOBAL_BATCH,
        max_steps=last,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=5,
        max_grad_norm=1000.0,
        max_tokens=60,
        logging_steps=1,
        save_steps=1,
        save_total_limit=1,
        eval_strategy="no",
        disable_tqdm=True,
        **options,
    )
    model = make_model(tied=True)
    model.model.norm.register_buffer("steps", torch.zeros(2))
    trainer = RankTrainer(model, config, close_groups())
    trainer.add_callback(CountSteps())
    trainer.train(resume_from_checkpoint="auto")
    return {
        "weights": whole_weights(trainer),
        "steps": trainer.lm.model.norm.steps.tolist(),
        "log": [row for row in trainer.state.log_history if "grad_norm" in row],
    }


def run_stage(out: Path, name: str, folder: str, engine: str, **options: Any) -> None:
    if engine != "ddp":
        force_engine(engine)
    try:
        found: Any = train(out / folder, **options)
    except InputError as error:
        found = str(error)
    if os.environ["RANK"] == "0":
        torch.save(found, out / f"{name}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for text in sys.argv[2:]:
        run_stage(Path(sys.argv[1]), **json.loads(text))
    dist.destroy_process_group()
