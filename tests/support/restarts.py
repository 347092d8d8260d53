"""One stage of a run that changes its engine and number of processes: ``restarts.py OUT ENGINE
STEPS``. It goes on from the latest checkpoint in OUT/run and saves after every step."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from forced_engines import GLOBAL_BATCH, close_groups, force_engine, make_model, whole_weights

from fastrank.training.config import RankConfig
from fastrank.training.trainer import RankTrainer

#: Engine, processes, and the step to train to, one after the other.
STAGES = [("ddp", 2, 2), ("fsdp2", 2, 4), ("ddp", 1, 6), ("fsdp2", 4, 8)]


def train(folder: Path, steps: int, **options: Any) -> dict[str, Any]:
    config = RankConfig(
        output_dir=str(folder / "run"),
        groups_per_step=GLOBAL_BATCH,
        max_steps=steps,
        learning_rate=1e-3,
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
    trainer = RankTrainer(make_model(tied=True), config, close_groups())
    trainer.train(resume_from_checkpoint="auto")
    return {
        "weights": whole_weights(trainer),
        "log": [row for row in trainer.state.log_history if "grad_norm" in row],
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    place, engine, last = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    if engine != "ddp":
        force_engine(engine)
    found = train(place, last)
    if os.environ["RANK"] == "0":
        torch.save(found, place / f"{last}.pt")
    dist.destroy_process_group()
