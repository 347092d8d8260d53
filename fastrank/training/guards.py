"""Numbers that are not finite stop a run before they reach a weight.

Loss and gradient norm are looked at between the backward pass and the optimiser's step, when
the weights are still good. The records at fault are then found, first by their scores, then by
running each group of the step alone. ``nonfinite="stop"`` ends the run with their names;
``"skip"`` repeats the step without them and counts them.

The check costs one read of two numbers from the device per step. Looking at logging steps only
would be cheaper, but too late: one bad step spoils all weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastrank.data.packing import Group
from fastrank.training.batching import StepBatch
from fastrank.training.checkpoint import last_good
from fastrank.training.engine import Engine
from fastrank.training.step_metrics import Computed, are_possible

_NAMES_SHOWN = 5


@dataclass(frozen=True)
class FiniteGuard:
    """Finds numbers that are not finite, and the records behind them. Every process must call
    `is_finite`, `bad_weights` and `culprits`, and gets the same result.

    Attributes:
        engine: of the run.
        run_dir: holds the checkpoints to go back to.
        looks_first: whether a step is looked at before the weights take it; DeepSpeed's backward
            pass takes it.
    """

    engine: Engine
    run_dir: Path
    looks_first: bool = True

    def is_finite(self, loss: Tensor, norm: Any, request: int = 0) -> tuple[bool, int]:
        """Whether loss and gradient norm of a step are finite on every process; and the largest
        ``request`` of all processes, which travels along."""
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        norm = torch.as_tensor(norm, device=loss.device)
        finite = (norm.isfinite() & loss.isfinite()).to(torch.int32).reshape(1)
        if self.engine.num_processes == 1:
            return bool(finite), request
        found, least = self.engine.least(torch.cat((finite, finite.new_tensor([-request]))))
        return bool(found), -least

    def bad_weights(self, model: nn.Module) -> list[str]:
        """Names of the weights that are not finite on some process."""
        bad = []
        for name, parameter in model.named_parameters():
            local = getattr(parameter, "ds_tensor", parameter)  # ZeRO-3 leaves the rest empty
            local = local.to_local() if isinstance(local, DTensor) else local
            if local.is_floating_point() and not bool(local.detach().isfinite().all()):
                bad.append(name)
        return list(dict.fromkeys(self.engine.gather_all(bad)))

    def culprits(
        self,
        batch: StepBatch,
        computed: Iterable[Computed],
        is_sound: Callable[[int], bool] | None,
    ) -> list[int]:
        """Positions in the step of the groups at fault; all of them if none can be told.

        Args:
            batch: the step.
            computed: its results on this process.
            is_sound: tries the group at this position in the training set alone; None where a
                process cannot run the model alone.
        """

        def at_fault(index: int, scores: Tensor) -> bool:
            if not are_possible(scores):
                return True
            if bool(scores.isfinite().all()):
                return False
            # A loss may be finite at a score of -inf: the group alone tells.
            return is_sound is None or not is_sound(batch.index[index])

        pairs = (pair for part in computed for pair in part.groups())
        found = self._agreed(index for index, scores in pairs if at_fault(index, scores))
        if not found and is_sound is not None:
            found = self._agreed(i for i in batch.members if not is_sound(batch.index[i]))
        return found or list(range(batch.num_groups))

    def _agreed(self, positions: Iterable[int]) -> list[int]:
        return sorted(set(self.engine.gather(sorted(positions))))

    def weights_message(self, bad: Sequence[str], step: int) -> str:
        return (
            f"{len(bad)} weights are not finite after step {step} "
            f"(the first is {bad[0]}), so no checkpoint is written; lower the learning rate; "
            f"{last_good(self.run_dir)}"
        )

    def step_message(self, step: int, names: Sequence[str], num_groups: int) -> str:
        weights = (
            "the weights are as before the step"
            if self.looks_first
            else "DeepSpeed has changed the weights by it"
        )
        return (
            f"loss or gradient is not finite in step {step}, because of "
            f"{_listed(names)} ({len(names)} of the step's {num_groups} records); {weights}; "
            f"{self._advice('the records')}; {last_good(self.run_dir)}"
        )

    def evaluation_message(self, step: int, names: Sequence[str], num_groups: int) -> str:
        return (
            f"scores are not finite in the evaluation after step {step}, for "
            f"{_listed(names)} ({len(names)} of {num_groups} records); "
            f"{self._advice('them')}; {last_good(self.run_dir)}"
        )

    def _advice(self, records: str) -> str:
        skip = ", or leave them out with --nonfinite skip" if self.looks_first else ""
        return f"remove {records}{skip}"


def name_groups(groups: Sequence[Group], positions: Iterable[int], kind: str) -> list[str]:
    """Names for messages, e.g. of the third of the ``kind`` "training": "training group 3"."""
    return [groups[i].name or f"{kind} group {i}" for i in positions]


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NAMES_SHOWN])
    return shown + (f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else "")
