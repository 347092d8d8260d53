"""Scores, losses and ranking metrics of a set of groups, over all processes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

from fastrank.losses import Loss
from fastrank.training.batching import StepBatch
from fastrank.training.memory import explained_out_of_memory
from fastrank.training.step_metrics import Gather, Scored, score_metrics


def evaluate_packs(
    model: nn.Module,
    batches: Iterable[StepBatch],
    loss: Loss,
    device: torch.device,
    max_tokens: int,
    gather: Gather,
    on_step: Callable[[], None],
) -> tuple[list[np.ndarray], list[np.ndarray], dict[str, float]]:
    """Score every group once.

    Every process must call it with equally many batches; weight 0 marks packs that only keep
    the processes in step.

    Returns:
        One float32 array of scores a group and one of rewards, in the order of the data set,
        and the
        metrics: ``loss``, ``rank_loss``, ``sft_loss`` (means over groups) and those of
        `fastrank.training.step_metrics.score_metrics`. NaN values are left out.
    """
    mine: list[tuple[int, np.ndarray, np.ndarray]] = []
    sums = dict.fromkeys(("loss", "rank_loss", "sft_loss"), 0.0)
    with torch.no_grad():
        for batch in batches:
            for pack, weight in zip(batch.packs, batch.weights, strict=True):
                with explained_out_of_memory(pack, max_tokens):
                    output = model(pack=pack.to(device), loss=loss, reduction="sum")
                on_step()
                if not weight:
                    continue
                for name in sums:
                    sums[name] += float(getattr(output, name))
                sizes = pack.cu_groups.diff().tolist()
                parts = zip(
                    pack.group_index,
                    output.scores.float().cpu().split(sizes),
                    pack.rewards.cpu().split(sizes),
                    strict=True,
                )
                mine += [(index, s.numpy(), r.numpy()) for index, s, r in parts]
    everyone = gather([{"groups": mine, "sums": sums}])
    ordered: list[Any] = sorted(
        itertools.chain.from_iterable(part["groups"] for part in everyone), key=lambda item: item[0]
    )
    scores, rewards = [s for _, s, _ in ordered], [r for _, _, r in ordered]
    count = max(len(ordered), 1)
    values = {name: sum(part["sums"][name] for part in everyone) / count for name in sums}
    values |= score_metrics(
        [_scored(s, r) for s, r in zip(scores, rewards, strict=True)], full=True
    )
    return scores, rewards, {k: v for k, v in values.items() if not math.isnan(v)}


def _scored(scores: np.ndarray, rewards: np.ndarray) -> Scored:
    return Scored(
        scores=torch.from_numpy(scores),
        rewards=torch.from_numpy(rewards),
        reference_scores=None,
        tokens=torch.zeros(len(scores), dtype=torch.int64),
        sizes=(len(scores),),
    )
