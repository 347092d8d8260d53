"""What a logging step reports, gathered from every pack since the last one.

Scores stay on their device until a log line is due, so that measuring does not make the host
wait for the device after every pack.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

import fastrank_kernels
from fastrank import metrics
from fastrank.losses import Loss
from fastrank.outputs import RankingOutput

Gather = Callable[[list[Any]], list[Any]]
"""Concatenates every process's list, in the order of processes, on every process."""


class HasCandidates(Protocol):
    """What a step's metrics read of a `Pack`, or of groups that were packed in parts."""

    @property
    def rewards(self) -> Tensor: ...  # [C]

    @property
    def reference_scores(self) -> Tensor | None: ...  # [C]

    @property
    def cu_responses(self) -> Tensor: ...  # int32 [C + 1] on the host

    @property
    def cu_groups(self) -> Tensor: ...  # int32 [G + 1] on the host

    @property
    def group_index(self) -> Sequence[int]: ...  # [G], positions in the step

    @property
    def sequence_lengths(self) -> Sequence[int]: ...  # [C]

    @property
    def num_tokens(self) -> int: ...


@dataclass(frozen=True)
class Scored:
    """The scores of one pack, on the host: C candidates in G groups."""

    scores: Tensor  # [C]
    rewards: Tensor  # [C]
    reference_scores: Tensor | None  # [C]
    tokens: Tensor  # int64 [C], response tokens
    sizes: tuple[int, ...]  # candidates of each group


@dataclass
class StepWindow:
    """Sums over the packs of this process since the last log line."""

    packs: list[tuple[HasCandidates, Tensor]] = field(default_factory=list)  # scores on device
    losses: dict[str, Any] = field(default_factory=lambda: {"rank_loss": 0.0, "sft_loss": 0.0})
    steps: int = 0
    seconds: float = 0.0
    skipped: int = 0  # records left out because of numbers that are not finite
    # Tokens that joint training would compute; scored; back-propagated: in two-phase training.
    work: tuple[int, int, int] = (0, 0, 0)

    def add(self, pack: HasCandidates, output: RankingOutput, num_groups: int) -> None:
        """One pack of a step of ``num_groups`` groups; ``output`` holds sums over its groups."""
        self.packs.append((pack, output.scores))
        for name in self.losses:
            self.losses[name] = self.losses[name] + getattr(output, name) / num_groups

    def add_work(self, joint: int, scored: int, backpropagated: int) -> None:
        """What two-phase training computed of a step, in tokens."""
        before = self.work
        self.work = (before[0] + joint, before[1] + scored, before[2] + backpropagated)

    def add_step(self, seconds: float) -> None:
        self.steps += 1
        self.seconds += seconds

    def summary(self, loss: Loss, gather: Gather) -> dict[str, float]:
        """The log values over all processes. Every process must call it."""
        mine = {
            "scored": [_to_host(pack, scores) for pack, scores in self.packs],
            "losses": {name: float(value) for name, value in self.losses.items()},
            "tokens": sum(pack.num_tokens for pack, _ in self.packs),
            "separate": sum(sum(pack.sequence_lengths) for pack, _ in self.packs),
            "seconds": self.seconds,
            "work": self.work,
        }
        everyone = gather([mine])
        scored = list(itertools.chain.from_iterable(part["scored"] for part in everyone))
        steps = max(self.steps, 1)
        tokens = sum(part["tokens"] for part in everyone)
        seconds = max(part["seconds"] for part in everyone)
        values = {
            name: sum(part["losses"][name] for part in everyone) / steps for name in self.losses
        }
        values |= score_metrics(scored)
        values["live_fraction"] = live_fraction(scored, loss)
        values["tokens_per_second"] = tokens / seconds if seconds else math.nan
        values["shared_prompt_ratio"] = (
            sum(part["separate"] for part in everyone) / tokens if tokens else math.nan
        )
        joint, scored_tokens, backpropagated = (
            sum(part["work"][i] for part in everyone) for i in range(3)
        )
        if joint:
            values["backprop_fraction"] = backpropagated / joint
            values["work_saved"] = work_saved(joint, scored_tokens, backpropagated)
        if self.skipped:  # the same on every process
            values["skipped_records"] = float(self.skipped)
        return {name: value for name, value in values.items() if not math.isnan(value)}


def work_saved(joint: int, scored: int, backpropagated: int) -> float:
    """Share of the work of joint training with gradient checkpointing (4 forward passes' worth a
    token) that two phases saved, with 1 for a scored token and 3 for a back-propagated one;
    negative where more work was done."""
    return 1 - (scored + 3 * backpropagated) / (4 * joint) if joint else 0.0


def _to_host(pack: HasCandidates, scores: Tensor) -> Scored:
    return Scored(
        scores=scores.detach().cpu(),
        rewards=pack.rewards.cpu(),
        reference_scores=None if pack.reference_scores is None else pack.reference_scores.cpu(),
        tokens=pack.cu_responses.long().diff(),
        sizes=tuple(pack.cu_groups.diff().tolist()),
    )


def score_metrics(scored: list[Scored], *, full: bool = False) -> dict[str, float]:
    """Ranking metrics under the names that dashboards know; NaN where no group has a pair.

    ``rewards/chosen`` is the model's score of the best candidate, ``rewards/rejected`` the mean of
    the others', over the groups that have a strict pair. ``full`` adds NDCG and MRR.
    """
    groups = [
        pair
        for part in scored
        for pair in zip(part.scores.split(part.sizes), part.rewards.split(part.sizes), strict=True)
    ]
    ranking = metrics.ranking_metrics([s for s, _ in groups], [r for _, r in groups])
    chosen, rejected = [], []
    for scores, rewards in groups:
        best = int(rewards.argmax())  # the first of the highest
        if bool(rewards.min() < rewards[best]):
            chosen.append(float(scores[best]))
            rejected.append((float(scores.sum()) - chosen[-1]) / (len(scores) - 1))
    values = {
        "rewards/chosen": _mean(chosen),
        "rewards/rejected": _mean(rejected),
        "rewards/accuracies": ranking["pairwise_accuracy"],
        "rewards/margins": _mean(chosen) - _mean(rejected),
        "rank/kendall_tau": ranking["kendall_tau"],
        "rank/top1": ranking["top1_accuracy"],
    }
    if full:
        values |= {"rank/ndcg": ranking["ndcg"], "rank/mrr": ranking["mrr"]}
    return values


def live_fraction(scored: list[Scored], loss: Loss) -> float:
    """Share of the response tokens whose candidate has a gradient that is not exactly zero."""
    live = total = 0
    for part in scored:
        # A response of one token whose log-probability is the score has the same gradient but for
        # a factor.
        cu_responses = torch.arange(len(part.scores) + 1, dtype=torch.int32)
        ranked = fastrank_kernels.rank_tokens(
            part.scores,
            part.rewards,
            cu_responses=cu_responses,
            cu_groups=torch.tensor([0, *itertools.accumulate(part.sizes)], dtype=torch.int32),
            spec=loss.spec(),
            reference_scores=part.reference_scores if loss.uses_reference else None,
        )
        alive = fastrank_kernels.live_candidates(ranked.coefficients, cu_responses)
        live += int(part.tokens[alive].sum())
        total += int(part.tokens.sum())
    return live / total if total else math.nan


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan
