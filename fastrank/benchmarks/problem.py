"""What a suite hands to the runner: inputs, variants, a float64 reference and a floor."""

from __future__ import annotations

import abc
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .workloads import Workload

# The limits are far above what rounding gives in each dtype and far below what a wrong formula
# gives: TF32 products, for one, are no float32.
LIMITS = {"float64": 1e-9, "float32": 1e-4, "float16": 1e-2, "bfloat16": 3e-2}

Outputs = dict[str, Tensor]
"""Results of one run by name: the loss and the gradients."""

Step = Callable[[], Outputs]
"""One forward and backward; nothing of a run is kept for the next."""


@dataclass(frozen=True)
class Variant:
    """One way to do a workload."""

    name: str
    make: Callable[[Any], Step]
    """From the problem to the step; may import, compile and allocate."""
    target: str = "loss"
    """Which of the problem's references the results are held against."""
    present: Callable[[Any, Outputs], Outputs] | None = None
    """Brings results into the reference's layout, for the check alone."""
    ours: bool = False
    """Whether it is fastrank's own: an exception there is a defect, not a line in the table."""
    repeats: int = 1
    """Runs of the work in one call of the step (a captured graph holds several)."""
    missing: Callable[[Any], str | None] = lambda problem: None
    """The reason why it cannot run here, or None."""


@dataclass(frozen=True)
class Floor:
    """What the workload cannot do without, timed in the same run."""

    name: str
    step: Callable[[], Any]
    traffic_bytes: int = 0
    """Bytes that must move besides, at the measured copy bandwidth."""


class Problem(abc.ABC):
    """The inputs of one workload on one device."""

    inner = 1
    """Runs in one timed sample, for work too short for the clock."""
    has_memory = True
    """Whether peak memory says anything here."""

    def __init__(self, workload: Workload, device: torch.device) -> None:
        self.workload = workload
        self.device = device
        self.dtype: torch.dtype = getattr(torch, workload.dtype)
        self.limit = LIMITS[workload.dtype]
        self._references: dict[str, Outputs] = {}

    @abc.abstractmethod
    def variants(self) -> list[Variant]:
        """Every way to do the workload, fastrank's first."""

    @abc.abstractmethod
    def compute_reference(self, target: str) -> Outputs:
        """The results in float64 arithmetic from the same inputs, by plain torch operations."""

    def reference(self, target: str) -> Outputs:
        """`compute_reference`, once."""
        if target not in self._references:
            self._references[target] = self.compute_reference(target)
        return self._references[target]

    def forget_references(self) -> None:
        """Free the references: they would count as memory of what is measured next."""
        self._references.clear()

    def floor(self) -> Floor | None:
        """The floor, where the workload has one."""
        return None

    def parameters(self) -> list[Tensor] | None:
        """What is no activation, where saved activations say something; else None."""
        return None

    def product_flops(self) -> int:
        """Operations of one matrix product of the workload's size; 0 where none is counted."""
        return 0


_PROBLEMS = {
    "loss": ("loss_suite", "LossProblem"),
    "rank": ("rank_suite", "RankProblem"),
    "attention": ("attention_suite", "AttentionProblem"),
    "step": ("step_suite", "StepProblem"),
}


def build(workload: Workload, device: torch.device) -> Problem:
    """The workload's inputs on a device; the same workload gives the same inputs."""
    module, name = _PROBLEMS[workload.suite]
    problem: Problem = getattr(importlib.import_module(f".{module}", __package__), name)(
        workload, device
    )
    return problem


_VARIANTS = {
    "loss": "loss_peers",
    "rank": "rank_suite",
    "attention": "attention_suite",
    "step": "step_peers",
}


def variant_names(suite: str) -> list[str]:
    """The names of a suite's variants, fastrank first."""
    module = importlib.import_module(f".{_VARIANTS[suite]}", __package__)
    return list(dict.fromkeys(variant.name for variant in module.VARIANTS))


def rewards_with_accuracy(strength: Tensor, accuracy: float, generator: torch.Generator) -> Tensor:
    """Rewards [G, n], a permutation of 0 to n - 1 in each group, that agree with the order of
    ``strength`` [G, n] in about the share ``accuracy`` of the pairs: 0 is the opposite order, 1/2
    no relation, 1 the same order."""
    noise = torch.randn(strength.shape, generator=generator)
    ranks = _ranks(strength)
    if accuracy < 0.5:
        ranks, accuracy = strength.shape[1] - 1 - ranks, 1.0 - accuracy
    low, high = 0.0, 1000.0 * strength.shape[1]
    for _ in range(40):
        middle = (low + high) / 2
        good = _agreement(_ranks(ranks + middle * noise), ranks) >= accuracy
        low, high = (middle, high) if good else (low, middle)
    return _ranks(ranks + low * noise)


def _ranks(values: Tensor) -> Tensor:
    """The place of every value in its row's rising order, from 0."""
    return values.argsort(dim=1).argsort(dim=1).float()


def _agreement(values: Tensor, others: Tensor) -> float:
    """The share of pairs within rows that both order the same way."""
    n = values.shape[1]
    upper = torch.triu(torch.ones(n, n, dtype=torch.bool), 1)

    def order(x: Tensor) -> Tensor:
        return (x[:, :, None] > x[:, None, :])[:, upper]

    return (order(values) == order(others)).float().mean().item() if n > 1 else 1.0
