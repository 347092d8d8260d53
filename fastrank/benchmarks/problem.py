"""The interface between a suite and the runner: inputs, variants, a float64 reference and a floor.

The gate is here too: a variant is timed only after `check` has held its results against a float64
evaluation from the same inputs. The error of a result is ‖x − x₆₄‖ / ‖x₆₄‖.
"""

from __future__ import annotations

import abc
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .results import FASTRANK
from .workloads import Suite, Workload

# The limits are far above what rounding gives in each dtype and far below what a wrong formula
# gives: TF32 products, for one, are no float32.
LIMITS = {"float64": 1e-9, "float32": 1e-4, "float16": 1e-2, "bfloat16": 3e-2}

_CHUNK = 1 << 26

Outputs = dict[str, Tensor]
"""Results of one run by name: the loss and the gradients."""

Step = Callable[[], Outputs]
"""One forward and backward pass; nothing of a run is kept for the next."""

Target = Literal["loss", "published"]
"""The function that a variant computes: fastrank's, or that of the loss's published script."""


@dataclass(frozen=True)
class Variant:
    """One way to do a workload."""

    name: str
    make: Callable[[Any], Step]
    """From the problem to the step; may import, compile and allocate."""
    target: Target = "loss"
    present: Callable[[Any, Outputs], Outputs] | None = None
    """Brings results into the reference's layout, for the check alone."""
    ours: bool = False
    """Whether it is fastrank's own: an exception there is a defect, not a line in the table."""
    repeats: int = 1
    """Runs of the work per call of the step (a captured graph holds several)."""
    missing: Callable[[Any], str | None] = lambda problem: None
    """The reason why it cannot run here, or None."""


@dataclass(frozen=True)
class Floor:
    """The work that no variant can do without, timed in the same run."""

    name: str
    step: Callable[[], Any]
    traffic_bytes: int = 0
    """Bytes that must move besides, at the measured copy bandwidth."""


class Problem(abc.ABC):
    """The inputs of one workload on one device; the same workload gives the same inputs."""

    inner = 1
    """Runs per timed sample, for work too short for the clock."""
    has_memory = True
    """Whether peak memory says anything here."""
    product_flops = 0
    """Operations of one matrix product of the workload's size; 0 where none is counted."""

    def __init__(self, workload: Workload, device: torch.device) -> None:
        self.workload = workload
        self.device = device
        self.dtype: torch.dtype = getattr(torch, workload.dtype)
        self.limit = LIMITS[workload.dtype]
        self.variants: list[Variant] = _suite(workload.suite).VARIANTS
        self._references: dict[Target, Outputs] = {}

    @abc.abstractmethod
    def compute_reference(self, target: Target) -> Outputs:
        """The results in float64 arithmetic from the same inputs, by plain torch operations."""

    def reference(self, target: Target) -> Outputs:
        """`compute_reference`, once."""
        if target not in self._references:
            self._references[target] = self.compute_reference(target)
        return self._references[target]

    def forget_references(self) -> None:
        """Free the references: they would count as memory in the next measurement."""
        self._references.clear()

    def floor(self) -> Floor | None:
        """The floor, where the workload has one."""
        return None

    def parameters(self) -> list[Tensor] | None:
        """The tensors that are no activations, where saved activations say something; else None."""
        return None


# ---- suites --------------------------------------------------------------------------------------


_MODULES: dict[str, str] = {
    "loss": "loss_peers",
    "rank": "rank_suite",
    "attention": "attention_suite",
    "step": "step_suite",
}
"""Each module has a ``PROBLEM``, its class, and ``VARIANTS``, fastrank's first."""


def _suite(name: Suite) -> Any:
    return importlib.import_module(f".{_MODULES[name]}", __package__)


def build_problem(workload: Workload, device: torch.device) -> Problem:
    """The workload's inputs on a device."""
    problem: Problem = _suite(workload.suite).PROBLEM(workload, device)
    return problem


def variant_names(suite: Suite) -> list[str]:
    """The names of a suite's variants, fastrank first."""
    return [variant.name for variant in _suite(suite).VARIANTS]


def quick_variants(suite: Suite) -> list[str]:
    """fastrank, and its peers that need no compilation before the first run."""
    return [
        variant.name
        for variant in _suite(suite).VARIANTS
        if variant.name == FASTRANK
        or not (variant.ours or variant.target == "published" or "compile" in variant.name)
    ]


def make_step(workload: dict[str, Any], variant: str) -> Step:
    """A variant's step on a CPU, from JSON types: for a process of its own."""
    problem = build_problem(Workload.from_json(workload), torch.device("cpu"))
    return next(v for v in problem.variants if v.name == variant).make(problem)


# ---- the gate ------------------------------------------------------------------------------------


class Verdict(NamedTuple):
    """Errors by the result's name, and the reason if one is too large."""

    errors: dict[str, float]
    wrong: str | None

    @property
    def error(self) -> float:
        """The largest error."""
        return max(self.errors.values())


def check(problem: Problem, variant: Variant) -> tuple[Step, Verdict]:
    """Make a variant's step, run it once and judge its results."""
    step = variant.make(problem)
    outputs = step()
    if variant.present is not None:
        outputs = variant.present(problem, outputs)
    return step, judge(outputs, problem.reference(variant.target), problem.limit)


def judge(outputs: Outputs, reference: Outputs, limit: float) -> Verdict:
    """Hold every result of the reference against the one of the same name."""
    errors = {
        name: relative_error(outputs[name], expected) if name in outputs else math.inf
        for name, expected in reference.items()
    }
    name = max(errors, key=lambda key: errors[key])
    if errors[name] <= limit:
        return Verdict(errors, None)
    return Verdict(errors, f"{name} is off by {errors[name]:.1e} (limit {limit:.0e})")


def relative_error(value: Tensor, expected: Tensor) -> float:
    """‖value − expected‖ / ‖expected‖ in float64; infinite for another shape or a NaN."""
    if value.shape != expected.shape:
        return math.inf
    expected, value = expected.detach().reshape(-1), value.detach().reshape(-1)
    off = torch.zeros((), dtype=torch.float64, device=expected.device)
    size = off.clone()
    for a, b in zip(value.split(_CHUNK), expected.split(_CHUNK), strict=True):
        off += (a.to(b.device).double() - b.double()).square().sum()
        size += b.double().square().sum()
    error = (off.sqrt() / size.sqrt()).item() if size.item() else off.sqrt().item()
    return error if math.isfinite(error) else math.inf


# ---- rewards -------------------------------------------------------------------------------------


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
    i, j = torch.triu_indices(values.shape[1], values.shape[1], 1)
    same = (values[:, i] > values[:, j]) == (others[:, i] > others[:, j])
    return same.float().mean().item() if same.numel() else 1.0
