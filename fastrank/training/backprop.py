"""Joint and two-phase back-propagation: how a step, an evaluation and a single group are computed.

Joint training holds a group in one pack, so the loader cuts packs. In two phases it is known only
after scoring which candidates to pack, so the loader hands on groups: every process takes its share
of a step's groups, of like cost, and `fastrank.training.two_phase` cuts a group that is larger than
a pack. Where processes share the candidates of a group (`fastrank.training.splitting`) the loader
hands on groups too. The scores are exchanged after the first phase then, or in joint training
between the forward and the backward pass over a process's only pack: its loss is not fused with the
head in such a step, which costs one product with the head more where logits do not fit into memory.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fastrank.data.candidate_packs import Candidates, candidate_packs, filler_pack
from fastrank.data.packing import Group, Pack, pack
from fastrank.losses import Loss
from fastrank.modeling.cost import PackCost
from fastrank.outputs import RankingOutput
from fastrank.training.batching import StepBatch, StepCutter
from fastrank.training.engine import Engine
from fastrank.training.memory import explained_out_of_memory
from fastrank.training.splitting import CandidateShare
from fastrank.training.step_metrics import Computed, Evaluated, StepWindow
from fastrank.training.two_phase import Phases, Ranked, rank_candidates, weighted_sum
from fastrank_kernels import reuse_head_cast
from fastrank_kernels.host_memory import send


class StepResult(NamedTuple):
    """A step, or a repetition of it, before the optimiser's turn."""

    loss: Tensor
    """This process's groups, over those of the whole step, times the number of processes: its mean
    over the processes is the step's loss, as for gradients."""
    computed: list[Computed]
    """This process's groups, with sums of losses over them."""


@dataclass
class Backprop(abc.ABC):
    """A way to compute gradients over packs.

    Attributes:
        loss: the ranking loss.
        engine: how gradients travel between processes.
        device: of the model.
        max_tokens: of a pack.
        shared_prompts: whether a prompt is encoded once for all its candidates.
        computing: gives the context to compute losses in, e.g. autocast.
        cost: by which groups are dealt to processes.
        split_groups: whether processes may share the candidates of a group.
    """

    loss: Loss
    engine: Engine
    device: torch.device
    max_tokens: int
    shared_prompts: bool
    computing: Callable[[], AbstractContextManager[Any]]
    cost: PackCost
    split_groups: bool = False

    whole_groups: ClassVar[bool]
    """Whether a batch holds groups that are packed later."""

    def cutter(self) -> StepCutter:
        """The cutter of a step's groups into a batch for `step`."""
        return StepCutter(
            max_tokens=self.max_tokens,
            shared_prompts=self.shared_prompts,
            rank=self.engine.rank,
            world_size=self.engine.world_size,
            whole_groups=self.whole_groups,
            cost=self.cost,
            split_groups=self.split_groups,
        )

    def report(self, batch: StepBatch, ranked: Ranked, token_logprobs: Tensor) -> StepResult:
        """The result of a step over a batch's ``groups``, of which other processes may report
        some."""
        count = len(batch.groups) if batch.share is None else batch.share.num_reported
        rank_loss, sft_loss = (x[:count].sum() for x in (ranked.rank_loss, ranked.sft_loss))
        loss = rank_loss + sft_loss
        result = StepResult(loss * (ranked.scale * self.engine.world_size), [])
        if count:
            reported = Candidates.of(batch.groups[:count], self.shared_prompts)
            sums = RankingOutput(
                loss=loss,
                rank_loss=rank_loss,
                sft_loss=sft_loss,
                scores=ranked.scores[: len(reported.rewards)],
                token_logprobs=token_logprobs[: reported.num_response_tokens],
            )
            place = reported._replace(group_index=batch.members[:count])
            result.computed.append(Computed(place, sums))
        return result

    @abc.abstractmethod
    def step(self, model: nn.Module, batch: StepBatch, window: StepWindow) -> StepResult:
        """Accumulate the gradients of a step; ``window`` counts the work, where it is counted."""

    @abc.abstractmethod
    def evaluate(self, model: nn.Module, batch: StepBatch) -> Evaluated | None:
        """Score a batch of a `fastrank.training.batching.PackDataset`; None if this process has no
        group in it. Every process must call it equally often."""

    @abc.abstractmethod
    def is_sound(self, model: nn.Module, group: Group) -> bool:
        """Whether a group by itself has a finite loss and gradient. ``.grad`` is left alone, and
        nothing is communicated."""


class JointBackprop(Backprop):
    """One forward and backward pass over packs of whole groups."""

    whole_groups = False

    def step(self, model: nn.Module, batch: StepBatch, window: StepWindow) -> StepResult:
        if batch.share is not None:
            return self._step_of_parts(model, batch, batch.share)
        total = torch.zeros((), device=self.device)
        computed: list[Computed] = []
        # DDP and FSDP take the mean over processes, so the sum needs their number.
        share = self.engine.world_size / batch.num_groups
        last = len(batch.packs) - 1
        with self.engine.step(model), reuse_head_cast(enabled=last > 0):
            for number, (whole, weight) in enumerate(zip(batch.packs, batch.weights, strict=True)):
                with (
                    explained_out_of_memory(whole, self.max_tokens),
                    self.engine.synchronising(model, number == last),
                    self.computing(),
                ):
                    whole = whole.to(self.device, non_blocking=True)
                    output = model(pack=whole, loss=self.loss, reduction="sum")
                    self.engine.backward(output.loss * (weight * share))
                if weight:
                    total += output.loss.detach() * share
                    computed.append(Computed(whole, output._replace(loss=output.loss.detach())))
        return StepResult(total, computed)

    def _step_of_parts(
        self, model: nn.Module, batch: StepBatch, share: CandidateShare
    ) -> StepResult:
        """A step in which processes share candidates, each in one pack."""
        candidates = Candidates.of(batch.groups, self.shared_prompts)
        packs = candidate_packs(
            batch.groups,
            max_tokens=self.max_tokens,
            shared_prompts=self.shared_prompts,
            live=share.own.tolist(),
        )
        (own,) = packs or [filler_pack(self.shared_prompts)]
        with (
            self.engine.step(model),
            explained_out_of_memory(own.pack, self.max_tokens, whole_groups=False),
            self.engine.synchronising(model, True),
            self.computing(),
        ):
            found = model(pack=own.pack.to(self.device, non_blocking=True)).token_logprobs
            at = send(own.tokens, self.device)
            with torch.no_grad():
                logprobs = found.new_zeros(candidates.num_response_tokens)
                logprobs[at] = found[: len(at)]  # no token of a filler's
                share.exchange(logprobs, self.engine.add_up)
            ranked = rank_candidates(self.loss, candidates, logprobs, 1.0 / batch.num_groups)
            if packs:
                total = weighted_sum(found, ranked.coefficients[at]) * self.engine.world_size
            else:
                total = found.sum() * 0.0
            with torch.autocast(self.device.type, enabled=False):
                self.engine.backward(total)
        return self.report(batch, ranked, logprobs)

    def evaluate(self, model: nn.Module, batch: StepBatch) -> Evaluated | None:
        (whole,), (weight,) = batch.packs, batch.weights
        with torch.no_grad(), explained_out_of_memory(whole, self.max_tokens):
            whole = whole.to(self.device, non_blocking=True)
            output = model(pack=whole, loss=self.loss, reduction="none")
        return Evaluated(output, whole, whole.group_index) if weight else None

    def is_sound(self, model: nn.Module, group: Group) -> bool:
        (alone,) = pack([group], max_tokens=self.max_tokens, shared_prompts=self.shared_prompts)
        alone = alone.to(self.device, non_blocking=True)
        output = model(pack=alone, loss=self.loss, reduction="sum")
        return bool(output.loss.isfinite()) and _finite_gradients(output.loss, model)


class TwoPhaseBackprop(Backprop):
    """Scores of all candidates, then gradients of those that have one; see
    `fastrank.training.two_phase`."""

    whole_groups = True

    def step(self, model: nn.Module, batch: StepBatch, window: StepWindow) -> StepResult:
        phases = self._phases(model, self.engine)
        with self.engine.step(model), self.computing(), reuse_head_cast():
            scored = phases.score(batch.groups, batch.share)
            ranked = phases.rank(scored, 1.0 / batch.num_groups)
            output = phases.differentiate(batch.groups, scored, ranked, batch.share)
        result = self.report(batch, ranked, scored.token_logprobs)
        joint = sum(part.candidates.num_tokens for part in result.computed)
        window.add_work(joint, output.tokens_scored, output.tokens_backpropagated)
        return result

    def evaluate(self, model: nn.Module, batch: StepBatch) -> Evaluated | None:
        phases = self._phases(model, self.engine)
        scored = phases.score(batch.groups)
        ranked = phases.rank(scored, 1.0)
        output = RankingOutput(
            loss=ranked.rank_loss + ranked.sft_loss,
            rank_loss=ranked.rank_loss,
            sft_loss=ranked.sft_loss,
            scores=ranked.scores,
            token_logprobs=scored.token_logprobs,
        )
        return Evaluated(output, scored.candidates, batch.members) if batch.groups else None

    def is_sound(self, model: nn.Module, group: Group) -> bool:
        probe = _GradientProbe(model)
        phases = self._phases(model, probe)
        scored = phases.score([group])
        ranked = phases.rank(scored, 1.0)
        if not bool((ranked.rank_loss + ranked.sft_loss).isfinite().all()):
            return False
        phases.differentiate([group], scored, ranked)
        return probe.finite

    def _phases(self, model: nn.Module, engine: Engine) -> Phases:
        def explain(failing: Pack) -> AbstractContextManager[None]:
            return explained_out_of_memory(failing, self.max_tokens, whole_groups=False)

        return Phases(model, self.loss, max_tokens=self.max_tokens, engine=engine, explain=explain)


class _GradientProbe(Engine):
    """Looks at gradients instead of keeping them."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.finite = True

    def backward(self, total: Tensor) -> None:
        self.finite &= _finite_gradients(total, self.model)


def _finite_gradients(total: Tensor, model: nn.Module) -> bool:
    weights: Sequence[Tensor] = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(total, weights, allow_unused=True)
    return all(bool(grad.isfinite().all()) for grad in grads if grad is not None)
