"""The workloads: one definition of each, for every device, suite and way to start a benchmark.

Sizes follow the fields of `Workload`; every one can be overridden. Groups are rectangular (n equal
candidates of R tokens): that is the kindest case for the peers, which pad, so what is reported is
the gain without ragged lengths.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from fastrank.errors import InputError

SUITES = ("loss", "rank", "attention", "step")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Workload:
    """Sizes of one measurement. T = groups * candidates * response tokens."""

    name: str
    suite: str
    devices: tuple[str, ...]
    """Devices whose default run includes it; it can be asked for on any."""
    groups: int
    candidates: int
    response: int = 1
    prompt: int = 1
    """Prompt tokens. In the loss suite only the published loops look at it: they project prompts
    too, and one token is what suits them best."""
    vocab: int = 0
    hidden: int = 0
    dtype: str = "float32"
    loss: str = "rrhf"
    frozen_head: bool = False
    accuracy: float = 0.0
    """Pairwise accuracy of the scores before the step. At 0, every pair the wrong way round, RRHF
    leaves no row without a gradient (n even): the hardest case for what drops such rows."""
    model: str = ""
    """Step suite: the shape of the model, a name in `models.SHAPES`."""
    heads: int = 0
    kv_heads: int = 0
    head_size: int = 0
    seed: int = 0

    @property
    def tokens(self) -> int:
        """Response tokens in all, T."""
        return self.groups * self.candidates * self.response

    @property
    def sizes(self) -> str:
        """The sizes in one phrase, for tables."""
        parts = [f"{self.groups} x {self.candidates}"]
        if self.suite != "rank":
            parts[0] += f" x {self.response}"
        if self.suite in ("attention", "step"):
            parts.append(f"P {self.prompt}")
        if self.suite == "attention":
            parts.append(f"{self.heads}/{self.kv_heads} heads of {self.head_size}")
        if self.suite == "step":
            parts.append(self.model)
        if self.suite == "loss":
            parts.append(f"V {self.vocab}, D {self.hidden}")
        if self.frozen_head:
            parts.append("frozen head")
        if self.accuracy:
            parts.append(f"accuracy {self.accuracy:g}")
        return ", ".join([*parts, self.dtype])

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Workload:
        """The inverse of `as_dict`."""
        return cls(**{**fields, "devices": tuple(fields["devices"])})


_CPU, _CUDA, _BOTH = ("cpu",), ("cuda",), ("cpu", "cuda")


def _loss(name: str, devices: tuple[str, ...], sizes: tuple[int, ...], **fields: Any) -> Workload:
    groups, candidates, response, vocab, hidden = sizes
    return Workload(
        name, "loss", devices, groups, candidates, response, vocab=vocab, hidden=hidden, **fields
    )


def _attention(
    name: str, devices: tuple[str, ...], sizes: tuple[int, int, int], heads: tuple[int, int, int]
) -> Workload:
    prompt, candidates, response = sizes
    return Workload(
        name,
        "attention",
        devices,
        1,
        candidates,
        response,
        prompt,
        dtype="bfloat16" if "cuda" in devices else "float32",
        heads=heads[0],
        kv_heads=heads[1],
        head_size=heads[2],
    )


def _step(
    name: str, devices: tuple[str, ...], model: str, sizes: tuple[int, int, int], dtype: str
) -> Workload:
    prompt, candidates, response = sizes
    return Workload(
        name, "step", devices, 1, candidates, response, prompt, dtype=dtype, model=model
    )


_GPU_HEADS, _CPU_HEADS = (32, 8, 128), (8, 8, 32)

_ALL = [
    _loss("K1", _CUDA, (4, 8, 256, 128256, 4096), dtype="bfloat16"),
    _loss("K2", _CUDA, (4, 8, 256, 128256, 4096), dtype="bfloat16", frozen_head=True),
    _loss("K3", _CUDA, (8, 6, 128, 32000, 4096), dtype="bfloat16"),
    _loss("K4", _CUDA, (16, 8, 128, 151936, 896), dtype="bfloat16"),
    _loss("K5", _CPU, (4, 4, 128, 32000, 512)),
    _loss("K5-bf16", _CPU, (4, 4, 128, 32000, 512), dtype="bfloat16"),
    # As K5 with the paper's n = 6, late in training: RRHF leaves rows without a gradient.
    _loss("K5-85", _CPU, (4, 6, 96, 32000, 512), accuracy=0.85),
    Workload("R1-64x8", "rank", _BOTH, 64, 8, accuracy=0.5),
    Workload("R1-512x16", "rank", _BOTH, 512, 16, accuracy=0.5),
    Workload("R1-16x64", "rank", _BOTH, 16, 64, accuracy=0.5),
    Workload("R1-64x8-pro", "rank", _BOTH, 64, 8, loss="pro", accuracy=0.5),
    _attention("A1-2048", _CUDA, (2048, 8, 256), _GPU_HEADS),
    _attention("A1-512", _CUDA, (512, 8, 128), _GPU_HEADS),
    _attention("A1-256", _CUDA, (256, 4, 1024), _GPU_HEADS),
    _attention("A1-512-cpu", _CPU, (512, 8, 128), _CPU_HEADS),
    _attention("A1-256-cpu", _CPU, (256, 4, 512), _CPU_HEADS),
    _step("S1-qwen", _CUDA, "qwen2.5-0.5b", (1024, 8, 256), "bfloat16"),
    _step("S1-llama", _CUDA, "llama-3.2-1b", (1024, 8, 256), "bfloat16"),
    _step("S2", _CPU, "llama-6x256", (512, 8, 128), "float32"),
    _step("S2-1024", _CPU, "llama-6x256", (1024, 8, 128), "float32"),
    _step("S2-256", _CPU, "llama-6x256", (256, 4, 512), "float32"),
]
WORKLOADS: dict[str, Workload] = {workload.name: workload for workload in _ALL}
"""Every workload by its name."""


_COMMON = ("groups", "candidates", "dtype", "loss", "seed")
_RESIZABLE = {
    "loss": (*_COMMON, "tokens", "response", "prompt", "vocab", "hidden", "accuracy"),
    "rank": (*_COMMON, "accuracy"),
    "attention": ("candidates", "dtype", "seed", "response", "prompt"),
    "step": (*_COMMON, "tokens", "response", "prompt", "model"),
}


def select(suite: str, device: str, names: list[str] | None = None) -> list[Workload]:
    """The workloads of a suite: those named, or the device's own.

    Raises:
        InputError: no such workload in the suite.
    """
    known = {w.name: w for w in _ALL if w.suite == suite}
    if names is None:
        return [w for w in known.values() if device in w.devices]
    for name in names:
        if name not in known:
            raise InputError(
                f"--workload of suite {suite} must be one of {', '.join(known)}, got {name}"
            )
    return [known[name] for name in names]


def resize(workload: Workload, *, tokens: int | None = None, **sizes: Any) -> Workload:
    """The workload with other sizes; those that are None stay. ``tokens`` sets the number of
    groups.

    Raises:
        InputError: a size that the suite does not have or that is not positive, or tokens that are
            no whole number of groups.
    """
    given = {name: value for name, value in sizes.items() if value is not None}
    known = _RESIZABLE[workload.suite]
    for name, value in {**given, **({} if tokens is None else {"tokens": tokens})}.items():
        if name not in known:
            raise InputError(
                f"--{name} is no size of suite {workload.suite}, which has {', '.join(known)}"
            )
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            raise InputError(f"--{name} must be at least 1, got {value}")
    if not 0.0 <= given.get("accuracy", 0.0) <= 1.0:
        raise InputError(f"--accuracy must lie between 0 and 1, got {given['accuracy']}")
    workload = dataclasses.replace(workload, **given)
    if tokens is not None:
        group = workload.candidates * workload.response
        if tokens % group:
            raise InputError(
                f"--tokens must be a multiple of candidates x response = {group}, got {tokens}"
            )
        workload = dataclasses.replace(workload, groups=tokens // group)
    return workload
