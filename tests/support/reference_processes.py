"""What one of two processes does in the test of distributed reference scores."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from pack_cases import random_groups

from fastrank.data.packing import Group
from fastrank.modeling.reference_scores import with_reference_scores


def make_groups() -> list[Group]:
    """Seven groups of one to four candidates, for the tokenizer of `tiny_models`."""
    shapes = [(k % 4 + 1, [k % 3 + j + 1 for j in range(k % 4 + 1)]) for k in range(7)]
    return random_groups(shapes, vocab=100)


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
