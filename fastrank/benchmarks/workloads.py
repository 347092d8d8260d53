"""The workloads: one definition of each, for every device, suite and entry point.

Sizes follow the fields of `Workload`; every one can be overridden. Groups are rectangular (n equal
candidates of R tokens): that is the kindest case for the peers, which pad, so the reported gain is
that without ragged lengths.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from fastrank.errors import InputError

Suite = Literal["loss", "rank", "attention", "step"]
SUITES: tuple[Suite, ...] = get_args(Suite)


class ModelShape(NamedTuple):
    """The sizes that a causal language model's cost depends on."""

    family: Literal["llama", "qwen2"]
    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    tied: bool


MODEL_SHAPES = {
    "qwen2.5-0.5b": ModelShape("qwen2", 151936, 896, 24, 14, 2, 64, 4864, True),
    "llama-3.2-1b": ModelShape("llama", 128256, 2048, 16, 32, 8, 64, 8192, True),
    "llama-6x256": ModelShape("llama", 32000, 256, 6, 8, 8, 32, 1024, False),
    "llama-4x128": ModelShape("llama", 8192, 128, 4, 4, 4, 32, 512, False),
    "llama-2x32": ModelShape("llama", 512, 32, 2, 4, 2, 8, 64, False),
}
"""Models of the step suite: the shapes of known ones, and small ones for CPUs and tests."""


@dataclass(frozen=True)
class Workload:
    """Sizes of one measurement. T = groups * candidates * response tokens."""

    name: str
    suite: Suite
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
    loss: Literal["rrhf", "pro"] = "rrhf"
    frozen_head: bool = False
    autocast: bool = False
    """Loss suite: as in mixed-precision training, a float32 head multiplied in ``dtype``."""
    softcap: float = 0.0
    """Loss suite: of the logits, beside a bias for every vocabulary entry; 0 for neither."""
    accuracy: float = 0.0
    """Pairwise accuracy of the scores before the step. At 0, every pair the wrong way round, RRHF
    leaves no row without a gradient (n even): the hardest case for a library that drops them."""
    model: str = ""
    """Step suite: the shape of the model, a name in `MODEL_SHAPES`."""
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
        if self.autocast:
            parts.append("float32 head under autocast")
        if self.softcap:
            parts.append(f"bias, softcap {self.softcap:g}")
        if self.accuracy:
            parts.append(f"accuracy {self.accuracy:g}")
        return ", ".join([*parts, self.dtype])

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Workload:
        """The inverse of `dataclasses.asdict`, after a way through JSON."""
        return cls(**{**fields, "devices": tuple(fields["devices"])})


_CPU, _CUDA, _BOTH = ("cpu",), ("cuda",), ("cpu", "cuda")
_BF16 = "bfloat16"
_GPU_HEADS: dict[str, Any] = {"heads": 32, "kv_heads": 8, "head_size": 128, "dtype": _BF16}
_CPU_HEADS: dict[str, Any] = {"heads": 8, "kv_heads": 8, "head_size": 32}
_SMALL = "llama-6x256"

# Name, suite, devices, groups, candidates, response tokens, prompt tokens.
_ALL = [
    Workload("K1", "loss", _CUDA, 4, 8, 256, vocab=128256, hidden=4096, dtype=_BF16),
    Workload(
        "K2", "loss", _CUDA, 4, 8, 256, vocab=128256, hidden=4096, dtype=_BF16, frozen_head=True
    ),
    Workload("K3", "loss", _CUDA, 8, 6, 128, vocab=32000, hidden=4096, dtype=_BF16),
    Workload("K4", "loss", _CUDA, 16, 8, 128, vocab=151936, hidden=896, dtype=_BF16),
    # Late in training: rows without a gradient.
    Workload(
        "K1-85", "loss", _CUDA, 4, 8, 256, vocab=128256, hidden=4096, dtype=_BF16, accuracy=0.85
    ),
    Workload(
        "K1-autocast",
        "loss",
        _CUDA,
        4,
        8,
        256,
        vocab=128256,
        hidden=4096,
        dtype=_BF16,
        autocast=True,
    ),  # fmt: skip
    Workload(
        "K3-softcap", "loss", _CUDA, 8, 6, 128, vocab=32000, hidden=4096, dtype=_BF16, softcap=30.0
    ),
    # GPT-2's odd vocabulary.
    Workload("K4-odd", "loss", _CUDA, 16, 8, 128, vocab=50257, hidden=768, dtype=_BF16),
    Workload("K5", "loss", _CPU, 4, 4, 128, vocab=32000, hidden=512),
    Workload("K5-bf16", "loss", _CPU, 4, 4, 128, vocab=32000, hidden=512, dtype=_BF16),
    # As K5 with the paper's n = 6, late in training: RRHF leaves rows without a gradient.
    Workload("K5-85", "loss", _CPU, 4, 6, 96, vocab=32000, hidden=512, accuracy=0.85),
    Workload("R1-64x8", "rank", _BOTH, 64, 8, accuracy=0.5),
    Workload("R1-512x16", "rank", _BOTH, 512, 16, accuracy=0.5),
    Workload("R1-16x64", "rank", _BOTH, 16, 64, accuracy=0.5),
    Workload("R1-64x8-pro", "rank", _BOTH, 64, 8, loss="pro", accuracy=0.5),
    Workload("R1-64x8x128", "rank", _CUDA, 64, 8, 128, accuracy=0.5),
    Workload("A1-2048", "attention", _CUDA, 1, 8, 256, 2048, **_GPU_HEADS),
    Workload("A1-512", "attention", _CUDA, 1, 8, 128, 512, **_GPU_HEADS),
    Workload("A1-256", "attention", _CUDA, 1, 4, 1024, 256, **_GPU_HEADS),
    Workload("A1-512-cpu", "attention", _CPU, 1, 8, 128, 512, **_CPU_HEADS),
    Workload("A1-256-cpu", "attention", _CPU, 1, 4, 512, 256, **_CPU_HEADS),
    Workload("S1-qwen", "step", _CUDA, 1, 8, 256, 1024, dtype=_BF16, model="qwen2.5-0.5b"),
    Workload("S1-llama", "step", _CUDA, 1, 8, 256, 1024, dtype=_BF16, model="llama-3.2-1b"),
    Workload("S2", "step", _CPU, 1, 8, 128, 512, model=_SMALL),
    Workload("S2-1024", "step", _CPU, 1, 8, 128, 1024, model=_SMALL),
    Workload("S2-256", "step", _CPU, 1, 4, 512, 256, model=_SMALL),
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


def choose_workloads(suite: str, device: str, names: list[str] | None = None) -> list[Workload]:
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
        InputError: a size that the suite does not have or that is not positive, no such model, or
            tokens that are no whole number of groups.
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
    if workload.model and workload.model not in MODEL_SHAPES:
        raise InputError(f"--model must be one of {', '.join(MODEL_SHAPES)}, got {workload.model}")
    if tokens is not None:
        group = workload.candidates * workload.response
        if tokens % group:
            raise InputError(
                f"--tokens must be a multiple of candidates x response = {group}, got {tokens}"
            )
        workload = dataclasses.replace(workload, groups=tokens // group)
    return workload
