"""What every process of the distributed training tests runs: ``train_processes.py OUT CASE ...``.

A case trains for a few steps and leaves, for each process, the weights, the log and an evaluation.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import own_losses
import torch
import torch.distributed as dist
from datasets.distributed import split_dataset_by_node
from faults import TRIGGER, limit_memory, poison, spoil_scores
from menu_files import menu_rows
from pack_cases import random_groups, tied_groups
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fastrank.errors import InputError
from fastrank.function_loss import FunctionLoss
from fastrank.tasks.menu import tiny_llama, word_tokenizer
from fastrank.training.batching import StepBatch
from fastrank.training.config import RankConfig
from fastrank.training.step_metrics import StepWindow
from fastrank.training.trainer import RankTrainer

STEPS = 4  # two epochs
GLOBAL_BATCH = 12  # groups a step; 23 groups: the last step of an epoch has 11
LEARNING_RATE = 0.1

OWN_RRHF = {"loss": f"{own_losses.__file__}:rrhf", "loss_kwargs": {"sft_weight": 1.0}}

# case: (groups for each of two processes, accumulation, options)
CASES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "one pack": (6, 1, {}),
    "accumulation 1": (6, 1, {"max_tokens": 75}),
    "accumulation 2": (3, 2, {"max_tokens": 75}),
    "accumulation 3": (2, 3, {"max_tokens": 75}),
    "padded rows": (6, 1, {"max_tokens": 75, "shared_prompts": False}),
    "outside": (6, 1, {"max_tokens": 75}),
    "skip": (6, 1, {"max_tokens": 75, "nonfinite": "skip"}),
    "find": (6, 1, {"auto_find_pack_size": True}),
    "two phases": (6, 1, {"max_tokens": 20, "backprop": "two_phase"}),
    "own loss": (6, 1, {"max_tokens": 75, "loss": FunctionLoss(own_losses.rrhf, sft_weight=1.0)}),
    "own loss, two phases": (6, 1, {"max_tokens": 20, "backprop": "two_phase", **OWN_RRHF}),
    "shared candidates": (6, 1, {"max_tokens": 1000}),
    "shared candidates, two phases": (6, 1, {"max_tokens": 60, "backprop": "two_phase"}),
    "stream": (6, 1, {"max_tokens": 75, "save_strategy": "steps", "save_steps": 2}),
    "stream, divided": (6, 1, {"max_tokens": 75}),
    "fully_shard": (6, 1, {"max_tokens": 75}),
    "two phases, fully_shard": (6, 1, {"max_tokens": 20, "backprop": "two_phase"}),
}


def make_trainer(folder: Path, case: str, world_size: int) -> RankTrainer:
    per_device, accumulation, options = CASES[case]
    if world_size == 1:
        per_device, accumulation = GLOBAL_BATCH, 1
    config = RankConfig(
        output_dir=str(folder / "run"),
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=accumulation,
        max_steps=STEPS,
        optim="sgd",
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=1000.0,
        logging_steps=1,
        disable_tqdm=True,
        use_cpu=True,
        **{"save_strategy": "no"} | options,
    )
    assert config.groups_over(config.world_size) == GLOBAL_BATCH
    groups = tied_groups(11, 6, vocab=TRIGGER)
    if case.startswith("stream"):
        rows = stream_of_rows(divided="divided" in case)
        return RankTrainer(tiny_llama(0), config, rows, groups[:7], word_tokenizer())
    if case.startswith("shared"):  # one that costs more than half of its step
        groups[4] = random_groups([(5, [49, 55, 41, 30, 55])], vocab=30, name="large")[0]
    if case == "skip":
        groups = poison(groups, [5])
    trainer = RankTrainer(tiny_llama(0), config, groups, groups[:7])
    if case == "outside":  # the mistake that the design forbids: the model without its wrapper
        step = trainer.backprop.step
        trainer.backprop.step = lambda model, *rest: step(trainer.lm, *rest)  # type: ignore[method-assign]
    if case == "skip":
        spoil_scores(trainer.model)
    if case == "find" and int(os.environ.get("RANK", "0")) == world_size - 1:
        limit_memory(trainer.model, 100)
    return trainer


def stream_of_rows(divided: bool) -> Any:
    """17 records that are read as training goes on; or each process's share of them."""

    def rows() -> Iterator[dict[str, Any]]:
        yield from menu_rows(17)

    stream = datasets.IterableDataset.from_generator(rows)
    if not divided:
        return stream
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return split_dataset_by_node(stream, rank, world_size)


def run_case(folder: Path, case: str, world_size: int) -> dict[str, Any]:
    trainer = make_trainer(folder, case, world_size)
    if "fully_shard" in case and world_size > 1:
        return _train_sharded(trainer)
    step, shared = trainer.backprop.step, 0

    def counted(model: Any, batch: StepBatch, window: StepWindow) -> Any:
        nonlocal shared
        shared += batch.share is not None
        return step(model, batch, window)

    trainer.backprop.step = counted  # type: ignore[method-assign]
    try:
        trainer.train()
    except InputError as error:
        return {"error": str(error)}
    if case == "stream" and world_size > 1:
        trainer = make_trainer(folder, case, world_size)
        trainer.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-2"))
    return {
        "shared": shared,
        "weights": {k: v.detach().clone() for k, v in trainer.model.state_dict().items()},
        "log": [row for row in trainer.state.log_history if "grad_norm" in row],
        "evaluation": trainer.evaluate(),
        "max_tokens": trainer.max_tokens,
    }


def _train_sharded(trainer: RankTrainer) -> dict[str, Any]:
    """The trainer's own steps on a model that ``fully_shard`` has sharded.

    Through accelerate FSDP2 on a CPU becomes DDP; the engine itself works on gloo.
    """
    model: Any = trainer.model
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    loader = trainer.get_train_dataloader()
    losses, norms = [], []
    while len(losses) < STEPS:
        loader.set_epoch(len(losses) // len(loader))  # type: ignore[attr-defined]
        for batch in loader:
            optimizer.zero_grad()
            loss = trainer.backprop.step(model, batch, StepWindow()).loss
            dist.all_reduce(loss)
            losses.append(loss.item() / dist.get_world_size())
            grads = [p.grad.full_tensor() for p in model.parameters()]
            norms.append(torch.nn.utils.get_total_norm(grads).item())
            optimizer.step()
    assert all(isinstance(p, DTensor) for p in model.parameters())
    log = [
        {"loss": loss, "grad_norm": norm, "step": step}
        for step, (loss, norm) in enumerate(zip(losses, norms, strict=True), start=1)
    ]
    return {"weights": {k: v.full_tensor() for k, v in model.state_dict().items()}, "log": log}


def main(folder: Path, cases: list[str]) -> None:
    torch.set_num_threads(1)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for case in cases:
        torch.save(run_case(folder, case, world_size), folder / f"{case}-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
