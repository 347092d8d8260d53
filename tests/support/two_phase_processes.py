"""What every process of the two-phase tests runs; a child process has to be able to import it."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from architectures import build
from pack_cases import LARGE, random_groups, take_gradients
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import fastrank

MAX_TOKENS = 24
# Process 0 has more packs than process 1; in the last step process 1 has no group at all.
SHARES = {"uneven": ([0, 1, 3], [2, 4]), "empty": ([0, 1, 2, 3, 4], [])}


ENGINES = ("ddp", "fsdp2", "fsdp2 tied", "fsdp2 head apart")


def make_model(engine: str) -> nn.Module:
    return fastrank.prepare_model(build("llama", tie_word_embeddings=engine == "fsdp2 tied"))


def make_groups() -> list[fastrank.Group]:
    return random_groups(LARGE)


def wrap(model: nn.Module, engine: str) -> nn.Module:
    if engine == "ddp":
        return DistributedDataParallel(model)
    for layer in model.model.layers:
        fully_shard(layer)
    if engine == "fsdp2 head apart":
        fully_shard(model.lm_head)
    fully_shard(model)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return model


def bare_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Whole gradients by the bare model's names."""
    return {name.removeprefix("module."): g for name, g in take_gradients(model).items()}


def run(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size
    )
    groups = make_groups()
    loss = fastrank.RRHF(margin=0.1)
    results = {}
    for engine in ENGINES:
        model = wrap(make_model(engine), engine)
        for case, shares in SHARES.items():
            mine = [groups[i] for i in shares[rank]]
            output = fastrank.two_phase_backward(model, mine, loss=loss, max_tokens=MAX_TOKENS)
            results[engine, case] = (bare_gradients(model), output.loss, output.scores)
        mine = [groups[i] for i in SHARES["uneven"][rank]]
        (pack,) = fastrank.pack(mine, max_tokens=4096)
        output = model(pack=pack, loss=loss, reduction="sum")
        (output.loss * world_size / len(groups)).backward()
        results[engine, "joint"] = (
            bare_gradients(model),
            output.loss.detach() / len(groups),
            output.scores,
        )
    torch.save(results, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()
