"""Scores, losses and ranking metrics of a set of groups, over all processes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fastrank.losses import Loss
from fastrank.outputs import RankingOutput
from fastrank.training.batching import StepBatch
from fastrank.training.memory import explained_out_of_memory
from fastrank.training.step_metrics import Gather, Scored, score_metrics

_LOSSES = ("loss", "rank_loss", "sft_loss")


class HasGroups(Protocol):
    """What of a `Pack` an evaluation reads: C candidates in G groups."""

    @property
    def rewards(self) -> Tensor: ...  # [C]

    @property
    def cu_groups(self) -> Tensor: ...  # int32 [G + 1] on the host


@dataclass(frozen=True)
class Evaluated:
    """What the model made of some groups.

    Attributes:
        output: its losses are [G], or sums over the groups; scores are [C].
        candidates: the groups' rewards and offsets.
        members: the groups' positions in the data set.
    """

    output: RankingOutput
    candidates: HasGroups
    members: Sequence[int]


@dataclass(frozen=True)
class Evaluation:
    """The same on every process; entries are in the order of the data set.

    Attributes:
        scores: one float32 array a group.
        rewards: one array a group.
        values: ``loss``, ``rank_loss``, ``sft_loss`` (means over groups) and those of
            `fastrank.training.step_metrics.score_metrics`; NaN values are left out.
        bad: positions of groups with a score that is not finite; they are in no value, and
            ``skipped_records`` counts them.
    """

    scores: list[np.ndarray]
    rewards: list[np.ndarray]
    values: dict[str, float]
    bad: list[int]


def evaluate_packs(
    model: nn.Module,
    batches: Iterable[StepBatch],
    loss: Loss,
    device: torch.device,
    max_tokens: int,
    on_step: Callable[[], None],
) -> Iterator[Evaluated]:
    """One forward pass a pack, without a graph.

    Every process must take equally many batches; weight 0 marks packs that only keep the
    processes in step.
    """
    for batch in batches:
        for pack, weight in zip(batch.packs, batch.weights, strict=True):
            with torch.no_grad(), explained_out_of_memory(pack, max_tokens):
                output = model(pack=pack.to(device), loss=loss, reduction="none")
            on_step()
            if weight:
                yield Evaluated(output, pack, pack.group_index)


def summarize(evaluated: Iterable[Evaluated], gather: Gather) -> Evaluation:
    """Bring every process's groups together. Every process must call it."""
    groups: list[tuple[int, np.ndarray, np.ndarray]] = []
    sums, count = dict.fromkeys(_LOSSES, 0.0), 0
    for item in evaluated:
        sizes = item.candidates.cu_groups.diff().tolist()
        scores = item.output.scores.float().cpu().split(sizes)
        rewards = item.candidates.rewards.cpu().split(sizes)
        groups += [
            (index, s.numpy(), r.numpy())
            for index, s, r in zip(item.members, scores, rewards, strict=True)
        ]
        counted = _sum_losses(item.output, torch.stack([s.isfinite().all() for s in scores]))
        for name, value in counted[0].items():
            sums[name] += value
        count += counted[1]
    everyone = gather([{"groups": groups, "sums": sums, "count": count}])
    ordered: list[Any] = sorted(
        itertools.chain.from_iterable(part["groups"] for part in everyone), key=lambda item: item[0]
    )
    bad = [index for index, scores, _ in ordered if not np.isfinite(scores).all()]
    good = [(s, r) for _, s, r in ordered if np.isfinite(s).all()]
    total = max(sum(part["count"] for part in everyone), 1)
    values = {name: sum(part["sums"][name] for part in everyone) / total for name in _LOSSES}
    values |= score_metrics([_scored(s, r) for s, r in good], full=True)
    if bad:
        values["skipped_records"] = float(len(bad))
    return Evaluation(
        scores=[s for _, s, _ in ordered],
        rewards=[r for _, _, r in ordered],
        values={k: v for k, v in values.items() if not math.isnan(v)},
        bad=bad,
    )


def _sum_losses(output: RankingOutput, good: Tensor) -> tuple[dict[str, float], int]:
    """Sums of the losses over the groups that are ``good`` (bool [G]), and over how many."""
    if output.loss.dim() == 0 and not bool(good.all()):
        return {}, 0  # a sum that a bad group is part of
    keep = good if output.loss.dim() else torch.tensor(True)
    sums = {
        name: float(getattr(output, name).detach().float().cpu()[keep].sum()) for name in _LOSSES
    }
    return sums, int(good.sum())


def _scored(scores: np.ndarray, rewards: np.ndarray) -> Scored:
    return Scored(
        scores=torch.from_numpy(scores),
        rewards=torch.from_numpy(rewards),
        reference_scores=None,
        tokens=torch.zeros(len(scores), dtype=torch.int64),
        sizes=(len(scores),),
    )
