"""Steps in which three processes share candidates; a child process has to be able to import it."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import own_losses
import torch
import torch.distributed as dist
from architectures import build
from pack_cases import random_groups
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from two_phase_processes import bare_gradients

import fastrank
from fastrank.data.group import Group
from fastrank.loss import Loss
from fastrank.modeling.cost import PackCost
from fastrank.training.backprop import Backprop, JointBackprop, TwoPhaseBackprop
from fastrank.training.batching import StepDataset
from fastrank.training.engine import Engine, engine_of
from fastrank.training.step_metrics import StepWindow

PROCESSES = 3
# In the last step one process has no candidate.
STEPS = [[0, 1, 2, 3, 4], [1, 5], [1]]
SHAPES = [(7, [3, 1, 9]), (1, [4, 2]), (12, [5]), (4, [6, 6, 2, 11, 5, 5, 17, 19, 9, 3, 12, 18])]
SHAPES += [(9, [15, 3, 8]), (5, [7, 7, 3, 20])]

LOSSES: dict[str, Loss] = {
    "rrhf": fastrank.RRHF(margin=0.1),
    "pro": fastrank.PRO(),
    "dpo": fastrank.DPO(sft_weight=0.3),
    "own": fastrank.FunctionLoss(own_losses.rrhf, sft_weight=0.5),
}
# Kind of back-propagation, engine, loss, and whether prompts are shared.
CASES = [
    *(("joint", "ddp", loss, True) for loss in LOSSES),
    *(("two_phase", "ddp", loss, True) for loss in ("pro", "dpo")),
    *((kind, "fsdp2", "rrhf", True) for kind in ("joint", "two_phase")),
    *((kind, "ddp", "rrhf", False) for kind in ("joint", "two_phase")),
]


def make_groups() -> list[Group]:
    """With ties of rewards within the largest group, and context in the responses."""
    groups = random_groups(SHAPES, references=True, masked=True, name="data")
    large = groups[3]
    groups[3] = replace(large, rewards=(4 * large.rewards).round())
    return groups


def make_model(shared_prompts: bool) -> nn.Module:
    """Of float64 throughout: the norms and rotations of a Llama are in float32."""
    return fastrank.prepare_model(build("gpt2").double(), shared_prompts=shared_prompts)


def wrap(model: Any, engine: str) -> nn.Module:
    if engine == "ddp":
        return DistributedDataParallel(model)
    for layer in model.transformer.h:
        fully_shard(layer)
    return fully_shard(model)


def make_backprop(case: tuple[str, str, str, bool], model: nn.Module, engine: Engine) -> Backprop:
    kind, _, loss, shared_prompts = case
    return (TwoPhaseBackprop if kind == "two_phase" else JointBackprop)(
        loss=LOSSES[loss],
        engine=engine,
        device=torch.device("cpu"),
        max_tokens=40 if kind == "two_phase" else 1000,
        shared_prompts=shared_prompts,
        computing=contextlib.nullcontext,
        cost=PackCost.of_model(model),
        split_groups=True,
    )


def run_case(case: tuple[str, str, str, bool], engine: Any = None) -> list[dict[str, Any]]:
    """What a process finds in every step."""
    model = make_model(case[3])
    if engine is None:
        model = wrap(model, case[1])
    backprop = make_backprop(case, model, engine or engine_of(model))
    steps = StepDataset(make_groups(), backprop.cutter())
    found = []
    for index in STEPS:
        batch, window = steps.__getitems__(index), StepWindow(steps=1)
        result = backprop.step(model, batch, window)
        scores: dict[int, Tensor] = {}
        for part in result.computed:
            window.add(part, batch.num_groups)
            scores |= dict(part.groups())
        values = window.summary(backprop.loss, backprop.engine.gather)
        found.append(
            {
                "shared": 0 if batch.share is None else int((~batch.share.own).sum()),
                "tokens": batch.num_tokens,
                "gradients": bare_gradients(model),
                "loss": result.loss,
                "scores": scores,
                "values": {k: v for k, v in values.items() if "per_second" not in k},
            }
        )
    return found


def run(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size
    )
    results = [run_case(case) for case in CASES]
    torch.save(results, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()
