"""Training of a tensor-parallel model on CPU processes: ``tensor_parallel.py OUT TP CASE ...``.

The model of ``OUT/model`` is loaded as users do, ``TP`` processes to a replica, and trained for a
few steps through accelerate's code for GPUs (`forced_engines.force_engine`). Each process leaves
what `train_processes` leaves, in float64.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from forced_engines import STEADY, force_engine, whole_weights
from pack_cases import tied_groups
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from fastrank.modeling.mesh import data_share
from fastrank.modeling.prepare import head_path_of
from fastrank.tasks.menu import tiny_llama
from fastrank.training.config import RankConfig
from fastrank.training.engine import Engine, engine_of
from fastrank.training.trainer import RankTrainer

VOCABULARY = 35  # odd: the shards differ
STEPS = 3
GLOBAL_BATCH = 12

CASES: dict[str, dict[str, Any]] = {
    "joint": {"max_tokens": 75},
    "two_phase": {"max_tokens": 24, "backprop": "two_phase"},
}


def make_model() -> LlamaForCausalLM:
    """float64, with an odd vocabulary."""
    config = tiny_llama(0).config
    config.vocab_size = VOCABULARY
    torch.manual_seed(3)
    return LlamaForCausalLM(config).double()


def make_trainer(folder: Path, case: str, replicas: int, **loading: Any) -> RankTrainer:
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64, **loading)
    config = RankConfig(
        output_dir=str(folder / f"run-{case}"),
        per_device_train_batch_size=GLOBAL_BATCH // replicas,
        max_steps=STEPS,
        **STEADY,
        include_num_input_tokens_seen="all",
        use_cpu=not loading,
        head_path="fused",
        **CASES[case],
    )
    groups = tied_groups(11, 6, VOCABULARY)
    trainer = RankTrainer(model, config, groups, groups[:7])
    assert trainer.groups_per_step == GLOBAL_BATCH
    assert trainer.engine.world_size == replicas
    return trainer


def bad_weights(trainer: RankTrainer) -> list[str]:
    """What is found when one process's part of the head holds a NaN."""
    head = trainer.lm.lm_head.weight
    if int(os.environ.get("RANK", "0")) == 0:
        with torch.no_grad():
            (head.to_local() if isinstance(head, DTensor) else head)[0, 0] = torch.nan
    return trainer._guard.bad_weights(trainer.lm)


def _of_engine(engine: Engine) -> tuple[int, int]:
    return engine.rank, engine.world_size


def run_case(folder: Path, case: str, replicas: int = 1, **loading: Any) -> dict[str, Any]:
    trainer = make_trainer(folder, case, replicas, **loading)
    trainer.train()
    evaluation = trainer.evaluate()
    saved = folder / f"saved-{case}"
    trainer.save_model(str(saved))
    weights = whole_weights(trainer)
    return {
        "path": str(head_path_of(trainer.lm)),
        "shares": [tuple(data_share(trainer.lm))[:2], _of_engine(engine_of(trainer.lm))],
        "sharded": any(isinstance(p, DTensor) for p in trainer.lm.parameters()),
        "weights": weights,
        "bad": bad_weights(trainer),
        "log": [row for row in trainer.state.log_history if "grad_norm" in row],
        "tokens": trainer.state.num_input_tokens_seen,
        "evaluation": evaluation,
    }


def main(folder: Path, parts: int, cases: list[str]) -> None:
    from transformers.distributed import DistributedConfig

    torch.set_num_threads(1)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    replicas = world_size // parts
    for case in cases:
        force_engine("tensor parallel")
        placed = DistributedConfig(tp_size=parts, fsdp_size=replicas)
        result = run_case(folder, case, replicas, distributed_config=placed)
        torch.save(result, folder / f"{case}-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
