"""What one of two processes does in the test of distributed reference scores."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from fastrank.data.packing import Group
from fastrank.modeling.reference_scores import with_reference_scores


def make_groups() -> list[Group]:
    generator = torch.Generator().manual_seed(0)

    def draw(length: int) -> torch.Tensor:
        return torch.randint(6, 100, (length,), generator=generator)

    return [
        Group(draw(k % 4 + 1), tuple(draw(k % 3 + j + 1) for j in range(k % 4 + 1)), range_of(k))
        for k in range(7)
    ]


def range_of(k: int) -> torch.Tensor:
    return torch.arange(k % 4 + 1, dtype=torch.float32)


def run(rank: int, world: int, folder: str, model: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    found = with_reference_scores(
        make_groups(), model, normalize="sum", cache_dir=Path(folder) / "cache"
    )
    scores = [group.reference_scores for group in found]
    torch.save(scores, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()
