"""Numbers that are not finite stop a run before they reach a weight.

Loss and gradient norm are looked at between the backward pass and the optimiser's step, when
the weights are still good. The records at fault are then found, first by their scores, then by
running each group of the step alone. ``nonfinite="stop"`` ends the run with their names;
``"skip"`` repeats the step without them and counts them.

The check costs one read of two numbers a step from the device. Looking at logging steps only would
be cheaper, but too late: one bad step spoils all weights.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastrank.data.packing import Group
from fastrank.losses import Loss
from fastrank.outputs import RankingOutput
from fastrank.training.batching import StepBatch, StepCutter
from fastrank.training.config import RankConfig
from fastrank.training.failures import TrainingStopped
from fastrank.training.saving import StagedTrainer, last_good
from fastrank.training.step_metrics import HasCandidates, StepWindow
from fastrank.training.two_phase_step import is_sound

_NAMES_SHOWN = 5

Computed = list[tuple[HasCandidates, RankingOutput]]


class GuardedTrainer(StagedTrainer, abc.ABC):
    """Adds the guard to the step of a subclass, which computes one in `_accumulate`."""

    args: RankConfig
    loss: Loss

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._window = StepWindow()
        self._batch: StepBatch | None = None
        self._computed: Computed = []
        self._step_loss = torch.zeros(())
        self._loss_before: Tensor | None = None
        super().__init__(*args, **kwargs)

    @abc.abstractmethod
    def _accumulate(self, model: nn.Module, batch: StepBatch) -> tuple[Tensor, Computed]:
        """Forward and backward of a step; its loss as `training_step` returns it, and the packs."""

    @abc.abstractmethod
    def _cutter(self) -> StepCutter:
        """What cuts a step's groups into this process's packs."""

    @property
    def lm(self) -> nn.Module:
        """The model that is trained, without what distributed training wraps around it."""
        return self.accelerator.unwrap_model(self.model)

    def _begin_step(self, batch: StepBatch) -> None:
        self._batch = batch
        self._loss_before = self._tr_loss.clone()

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The last thing that the training loop does before the optimiser's step."""
        norm = super()._get_grad_norm(model, grad_norm)
        if not self._finite(norm):
            norm = self._recover(model)
        assert self._batch is not None
        for pack, output in self._computed:
            self._window.add(pack, output, self._batch.num_groups)
        self._computed = []
        return norm

    def _finite(self, norm: Any) -> bool:
        """Whether gradient norm and loss are finite on every process."""
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        value = torch.as_tensor(norm, device=self.args.device)
        good = value.isfinite() & self._step_loss.isfinite()
        if self.args.world_size > 1:
            flag = good.to(torch.int32)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN)
            good = flag
        return bool(good)

    def _recover(self, model: nn.Module) -> Any:
        """Stop, or repeat the step without the records at fault; returns the gradient norm."""
        batch = self._batch
        assert batch is not None
        self._refuse_spoilt_weights(Path(self.args.output_dir or "."))
        culprits = self._culprits(batch)
        if self.args.nonfinite == "stop":
            raise TrainingStopped(self._report(batch, culprits))
        self._window.skipped += len(culprits)
        model.zero_grad()
        assert self._loss_before is not None
        kept = [i for i in range(batch.num_groups) if i not in culprits]
        norm: Any = math.nan
        if kept:
            numbered = [(batch.index[i], self._group(batch.index[i])) for i in kept]
            self._batch = self._cutter()(numbered)
            self._step_loss, self._computed = self._accumulate(model, self._batch)
            clipped = self._clip_grad_norm(model) if self.args.max_grad_norm > 0 else None
            norm = super()._get_grad_norm(model, clipped)
        if not self._finite(norm):
            self._window.skipped += len(kept)
            model.zero_grad()  # an optimiser leaves weights without a gradient as they are
            self._computed, self._step_loss, norm = [], torch.zeros_like(self._step_loss), 0.0
        self._tr_loss.copy_(self._loss_before + self._step_loss)
        return norm

    def _group(self, position: int) -> Group:
        dataset: Any = self.train_dataset
        return dataset[position]

    def _culprits(self, batch: StepBatch) -> list[int]:
        """Positions in the step of the groups at fault; all of them if none can be told."""
        by_score = {
            group for pack, output in self._computed for group in bad_groups(pack, output.scores)
        }
        found = self._agreed(by_score)
        if not found and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            bad = {i for i in batch.members if not self._sound_alone(batch.index[i])}
            found = self._agreed(bad)
        return found or list(range(batch.num_groups))

    def _agreed(self, positions: set[int]) -> list[int]:
        return sorted(set(self._gather(sorted(positions))))

    def _sound_alone(self, position: int) -> bool:
        """Whether a group by itself has a finite loss and gradient. Nothing is communicated."""
        group = self._group(position)
        weights = [p for p in self.lm.parameters() if p.requires_grad]
        if self.args.two_phase:
            return is_sound(self.lm, group, self.loss, self._cutter().max_tokens, weights)
        pack, _ = self._cutter().build([group], [0])
        output = self.lm(pack=pack.to(self.args.device), loss=self.loss, reduction="sum")
        if not bool(output.loss.isfinite()):
            return False
        grads = torch.autograd.grad(output.loss, weights, allow_unused=True)
        return all(bool(grad.isfinite().all()) for grad in grads if grad is not None)

    def _report(self, batch: StepBatch, culprits: Sequence[int]) -> str:
        positions = [batch.index[i] for i in culprits]
        names = _listed([self._group(i).name or f"training group {i}" for i in positions])
        return (
            f"loss or gradient is not finite in step {self.state.global_step + 1}, because of "
            f"{names} ({len(culprits)} of the step's {batch.num_groups} records); the weights "
            "are as before the step; remove the records, or leave them out with "
            f"--nonfinite skip; {last_good(Path(self.args.output_dir or '.'))}"
        )

    def _bad_evaluation(self, groups: Sequence[Group], bad: Sequence[int]) -> str:
        names = _listed([groups[i].name or f"evaluation group {i}" for i in bad])
        return (
            f"scores are not finite in the evaluation after step {self.state.global_step}, for "
            f"{names} ({len(bad)} of {len(groups)} records); remove them, or leave them out with "
            f"--nonfinite skip; {last_good(Path(self.args.output_dir or '.'))}"
        )

    def _gather(self, items: list[Any]) -> list[Any]:
        """Every process's items, in the order of processes, on every process."""
        if self.args.world_size == 1:
            return items
        gathered: list[Any] = [None] * self.args.world_size
        torch.distributed.all_gather_object(gathered, items)
        return [item for part in gathered for item in part]


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NAMES_SHOWN])
    return shown + (f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else "")


def bad_groups(pack: HasCandidates, scores: Tensor) -> list[int]:
    """The pack's groups (by ``group_index``) with a score that is not finite."""
    parts = scores.detach().cpu().split(pack.cu_groups.diff().tolist())
    return [
        index
        for index, part in zip(pack.group_index, parts, strict=True)
        if not bool(part.isfinite().all())
    ]
