"""Log values of a training step, and of an evaluation, over all processes.

Scores stay on their device until a log line is due, so that measuring does not make the host
wait for the device after every pack.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import fastrank_kernels
from fastrank import metrics
from fastrank.arguments import length_exponent
from fastrank.data.candidate_packs import Candidates
from fastrank.data.packing import Pack
from fastrank.loss import Loss
from fastrank.outputs import RankingOutput
from fastrank.ranking import rank_coefficients

Gather = Callable[[list[Any]], list[Any]]
"""Concatenates every process's list, in the order of processes, on every process."""

AllCandidates = Pack | Candidates
"""Whole groups, in one pack or packed in parts."""

_LOSSES = ("loss", "rank_loss", "sft_loss")

#: A ranking term smaller than the supervised one by this factor is said to be dwarfed.
DWARFED = 10.0


class Computed(NamedTuple):
    """Groups of a training step, with sums of losses over them."""

    candidates: AllCandidates
    output: RankingOutput

    def groups(self) -> Iterator[tuple[int, Tensor]]:
        """Position in the step and scores [n], on the host, of every group."""
        scores = _split(self.output.scores.detach().cpu(), self.candidates)
        return zip(self.candidates.group_index, scores, strict=True)


class Evaluated(NamedTuple):
    """Groups of an evaluation."""

    output: RankingOutput
    """Losses are [G], or sums over the groups; scores are [C]."""
    candidates: AllCandidates
    members: Sequence[int]
    """Positions of the groups in the data set."""
    statistics: tuple[float, float, int] | None = None
    """Sum of entropies, hits and tokens, see `fastrank.modeling.token_statistics`."""


class ScoredGroup(NamedTuple):
    """One group's candidates, on the host."""

    scores: Tensor
    """[n] the model's own."""
    rewards: Tensor
    """[n]"""
    implicit: Tensor | None = None
    """[n] rewards of the model over its reference, see `implicit_rewards`."""


def are_possible(scores: Tensor) -> bool:
    """Whether scores can be those of responses: -inf is, of one that the model rules out, which
    some losses have no part in; NaN and +inf are not."""
    return bool((scores < math.inf).all())


def implicit_rewards(scores: Tensor, reference: Tensor | None, loss: Loss) -> Tensor | None:
    """``β (s − s_ref)`` of candidates, as DPO sees the model's reward (arXiv:2305.18290, equation
    5 up to a constant of the prompt); None for a loss without a reference."""
    if reference is None or not loss.uses_reference:
        return None
    return loss.reward_scale * (scores - reference.to(scores.dtype))


@dataclass(frozen=True)
class PackScores:
    """Scores of one pack, on the host: C candidates in G groups."""

    scores: Tensor  # [C]
    rewards: Tensor  # [C]
    reference_scores: Tensor | None  # [C]
    tokens: Tensor  # int64 [C], response tokens
    sizes: tuple[int, ...]  # candidates of each group

    def groups(self, loss: Loss) -> list[ScoredGroup]:
        """The candidates, group by group."""
        implicit = implicit_rewards(self.scores, self.reference_scores, loss)
        parts = (self.scores, self.rewards, self.scores if implicit is None else implicit)
        split = zip(*(values.split(self.sizes) for values in parts), strict=True)
        return [ScoredGroup(s, r, None if implicit is None else i) for s, r, i in split]


# ---- training ----------------------------------------------------------------------------


@dataclass
class StepWindow:
    """Sums over the packs of this process since the last log line."""

    packs: list[tuple[AllCandidates, Tensor]] = field(default_factory=list)  # scores on device
    losses: dict[str, Any] = field(default_factory=lambda: {"rank_loss": 0.0, "sft_loss": 0.0})
    steps: int = 0
    seconds: float = 0.0
    skipped: int = 0  # records left out because of numbers that are not finite
    # Two-phase training: tokens that joint training would compute; scored; back-propagated.
    work: tuple[int, int, int] = (0, 0, 0)

    def add(self, computed: Computed, num_groups: int) -> None:
        """Add a part of a step of ``num_groups`` groups."""
        self.packs.append((computed.candidates, computed.output.scores))
        for name in self.losses:
            self.losses[name] = self.losses[name] + getattr(computed.output, name) / num_groups

    def add_work(self, joint: int, scored: int, backpropagated: int) -> None:
        """Add the tokens that two-phase training computed in a step."""
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
        values |= score_metrics([group for part in scored for group in part.groups(loss)])
        values["live_fraction"] = live_fraction(scored, loss)
        values["tokens_per_second"] = tokens / seconds if seconds else math.nan
        separate = sum(part["separate"] for part in everyone)
        values["shared_prompt_ratio"] = separate / tokens if tokens else math.nan
        joint, scored_tokens, backpropagated = (
            sum(part["work"][i] for part in everyone) for i in range(3)
        )
        if joint:
            values["backprop_fraction"] = backpropagated / joint
            values["work_saved"] = work_saved(joint, scored_tokens, backpropagated)
        if self.skipped:  # the same on every process
            values["skipped_records"] = float(self.skipped)
        return _known(values)


def warn_of_supervision(loss: Loss, values: dict[str, float]) -> list[str]:
    """A line where a supervised term that is a sum over tokens dwarfs a ranking term of scores that
    are divided by lengths: the run is then one of supervised training, as PRO's can be."""
    rank, supervised = values.get("rank_loss", 0.0), values.get("sft_loss", 0.0)
    of_sums = loss.sft_reduction == "sum" and length_exponent(loss.normalize) > 0
    if not of_sums or not 0 < rank * DWARFED < supervised:
        return []
    return [
        f"the supervised term of {loss} is {supervised / rank:.0f} times its ranking term, which "
        "has next to no effect: set a lower sft_weight, or sft_reduction='mean'"
    ]


def work_saved(joint: int, scored: int, backpropagated: int) -> float:
    """Share of the work of joint training with gradient checkpointing (4 forward passes per token)
    that two phases saved, at 1 per scored token and 3 per back-propagated one; negative where more
    work was done."""
    return 1 - (scored + 3 * backpropagated) / (4 * joint) if joint else 0.0


def _to_host(pack: AllCandidates, scores: Tensor) -> PackScores:
    return PackScores(
        scores=scores.detach().cpu(),
        rewards=pack.rewards.cpu(),
        reference_scores=None if pack.reference_scores is None else pack.reference_scores.cpu(),
        tokens=pack.cu_responses.long().diff(),
        sizes=tuple(pack.cu_groups.diff().tolist()),
    )


def live_fraction(scored: Sequence[PackScores], loss: Loss) -> float:
    """Share of the response tokens whose candidate has a gradient that is not exactly zero."""
    live = total = 0
    for part in scored:
        # A response of one token whose log-probability is the score has the same gradient but for
        # a factor.
        cu_responses = torch.arange(len(part.scores) + 1, dtype=torch.int32)
        ranked = rank_coefficients(
            loss,
            part.scores,
            part.rewards,
            cu_responses=cu_responses,
            cu_groups=torch.tensor([0, *itertools.accumulate(part.sizes)], dtype=torch.int32),
            reference_scores=part.reference_scores,
        )
        alive = fastrank_kernels.live_candidates(ranked.coefficients, cu_responses)
        live += int(part.tokens[alive].sum())
        total += int(part.tokens.sum())
    return live / total if total else math.nan


# ---- evaluation --------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    """The same on every process; entries are in the order of the data set.

    Attributes:
        scores: one float32 array per group.
        rewards: one array per group.
        values: ``loss``, ``rank_loss``, ``sft_loss`` (means over groups) and those of
            `score_metrics`; NaN values are left out.
        bad: positions of groups with a score that cannot be (see `are_possible`), or with a loss
            that is not finite; they are in no value, and ``skipped_records`` counts them.
    """

    scores: list[np.ndarray]
    rewards: list[np.ndarray]
    values: dict[str, float]
    bad: list[int]


def summarize(evaluated: Iterable[Evaluated], loss: Loss, gather: Gather) -> Evaluation:
    """Bring every process's groups together. Every process must call it."""
    # Positions in the data set; scores, rewards and implicit rewards; whether all is well.
    groups: list[tuple[int, np.ndarray, np.ndarray, np.ndarray | None, bool]] = []
    sums, count = dict.fromkeys(_LOSSES, 0.0), 0
    statistics: list[tuple[float, float, int]] = []
    for item in evaluated:
        if item.statistics is not None:
            statistics.append(item.statistics)
        own = _to_host(item.candidates, item.output.scores.float()).groups(loss)
        good = torch.tensor(
            [are_possible(g.scores if g.implicit is None else g.implicit) for g in own]
        )
        finite = item.output.loss.detach().cpu().isfinite()
        if finite.dim() == 0 and not bool(finite):  # of a sum it is not known whose
            finite = torch.stack([g.scores.isfinite().all() for g in own])
        good &= finite
        groups += [
            (index, s.numpy(), r.numpy(), None if i is None else i.numpy(), fine)
            for index, (s, r, i), fine in zip(item.members, own, good.tolist(), strict=True)
        ]
        if item.output.loss.dim() == 0:
            if not bool(good.all()):
                continue  # a sum that a bad group is part of
            keep = torch.tensor(True)
        else:
            keep = good
        for name in _LOSSES:
            losses = getattr(item.output, name).detach().float().cpu()
            sums[name] += float(losses[keep].sum())
        count += int(good.sum())
    mine = {"groups": groups, "sums": sums, "count": count, "statistics": statistics}
    everyone = gather([mine])
    ordered: list[Any] = sorted(
        itertools.chain.from_iterable(part["groups"] for part in everyone), key=lambda item: item[0]
    )
    bad = [index for index, *_, fine in ordered if not fine]
    good_groups = [
        ScoredGroup(
            torch.from_numpy(scores),
            torch.from_numpy(rewards),
            None if implicit is None else torch.from_numpy(implicit),
        )
        for _, scores, rewards, implicit, fine in ordered
        if fine
    ]
    total = max(sum(part["count"] for part in everyone), 1)
    values = {name: sum(part["sums"][name] for part in everyone) / total for name in _LOSSES}
    values |= score_metrics(good_groups, full=True)
    known = [sums for part in everyone for sums in part["statistics"]]
    if known:
        entropy, hits, tokens = map(sum, zip(*known, strict=True))
        values |= {"entropy": entropy / tokens, "mean_token_accuracy": hits / tokens}
    if bad:
        values["skipped_records"] = float(len(bad))
    return Evaluation(
        scores=[s for _, s, *_ in ordered],
        rewards=[r for _, _, r, *_ in ordered],
        values=_known(values),
        bad=bad,
    )


# ---- both --------------------------------------------------------------------------------


def score_metrics(groups: Sequence[ScoredGroup], *, full: bool = False) -> dict[str, float]:
    """Ranking metrics under the names that dashboards know; NaN where no group has a pair, and not
    finite where a score of -inf is part of a mean.

    ``logps/chosen`` is the model's score of the best candidate, ``logps/rejected`` the mean of the
    others', over the groups that have a strict pair. ``rewards/*`` are the same, or where a loss
    uses a reference of the implicit rewards, as in TRL. ``rank/*`` are of the scores. ``full`` adds
    NDCG and MRR.
    """
    scores, rewards = [g.scores for g in groups], [g.rewards for g in groups]
    ranking = metrics.ranking_metrics(scores, rewards)
    chosen, rejected = _best_and_rest(scores, rewards)
    values = {"logps/chosen": chosen, "logps/rejected": rejected}
    accuracy = ranking["pairwise_accuracy"]
    implicit = [g.implicit for g in groups if g.implicit is not None]
    if implicit:
        chosen, rejected = _best_and_rest(implicit, rewards)
        accuracy = metrics.pairwise_accuracy(implicit, rewards)
    values |= {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": accuracy,
        "rewards/margins": chosen - rejected,
        "rank/kendall_tau": ranking["kendall_tau"],
        "rank/top1": ranking["top1_accuracy"],
    }
    if full:
        values |= {"rank/ndcg": ranking["ndcg"], "rank/mrr": ranking["mrr"]}
    return values


def _best_and_rest(values: Sequence[Tensor], rewards: Sequence[Tensor]) -> tuple[float, float]:
    """Mean over the groups with a strict pair of the best candidate's value, and of the others'."""
    chosen, rejected = [], []
    for own, group_rewards in zip(values, rewards, strict=True):
        best = int(group_rewards.argmax())  # the first of the highest
        if bool(group_rewards.min() < group_rewards[best]):
            chosen.append(float(own[best]))
            rejected.append(float(torch.cat((own[:best], own[best + 1 :])).mean()))
    return _mean(chosen), _mean(rejected)


def _split(values: Tensor, candidates: AllCandidates) -> Sequence[Tensor]:
    """Per-candidate values [C], group by group."""
    return values.split(candidates.cu_groups.diff().tolist())


def _known(values: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if math.isfinite(value)}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan
