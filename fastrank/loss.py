"""What every ranking loss has: its options, their checks, and its form for the operators."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import Any, ClassVar, get_args

import torch

from fastrank_kernels import Form, RankSpec

from .arguments import LARGEST, Normalize, Pooling, check_normalize, length_exponent


@dataclasses.dataclass(frozen=True, repr=False)
class Loss:
    """The options of every ranking loss.

    Args:
        sft_weight: weight λ >= 0 of the supervised term ``-λ Σ_t logp_t`` of the best candidate.
        sft_reduction: ``"mean"`` or ``"sum"`` of that term over the candidate's tokens.
        normalize: a score is the ``"mean"`` or the ``"sum"`` of its tokens' log-probabilities, or
            for a number α >= 0 their sum over ``|y|^α`` (RRHF's script calls it
            ``length_penalty``): 1 is the mean, 0 the sum.
        rank_weight: weight >= 0 of the ranking term (``rrhf_weight`` in RRHF's script).
        uses_reference: whether a reference model's scores are subtracted from the model's own, so
            that a score is a log-ratio; they are normalised alike.
    """

    _: dataclasses.KW_ONLY
    sft_weight: float = 0.0
    sft_reduction: Pooling = "mean"
    normalize: Normalize = "mean"
    rank_weight: float = 1.0
    uses_reference: bool = False

    _code: ClassVar[str | None]

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check(type(self).__name__, field, getattr(self, field.name))
        if self.own_term is not None and "reference_scores" in parameters(self.own_term):
            object.__setattr__(self, "uses_reference", True)
        spec = self._build_spec()
        object.__setattr__(self, "_code", None if spec is None else spec.encode())

    def __repr__(self) -> str:
        """The call that makes it, with the options that are not at their defaults."""
        given = [f"{name}={value!r}" for name, value in self.changed().items()]
        return f"{type(self).__name__}({', '.join(given)})"

    def changed(self) -> dict[str, Any]:
        """The options that are not at their defaults."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.default is not dataclasses.MISSING
            and getattr(self, field.name) != field.default
        }

    @property
    def own_term(self) -> Callable[..., Any] | None:
        """The ranking term of a loss that is written in Python: the method ``rank_term`` of a
        subclass, see `FunctionLoss`. None for a loss that the operators compute."""
        return getattr(self, "rank_term", None)

    @property
    def reward_scale(self) -> float:
        """β of the implicit reward ``β (s − s_ref)`` of a loss that uses a reference, for logs."""
        return float(getattr(self, "beta", 1.0))

    def spec(self) -> RankSpec:
        """The same loss as the operators take it."""
        if self._code is None:
            raise TypeError(
                f"{type(self).__name__} is not a loss by itself; use one such as fastrank.RRHF()"
            )
        # From a string, which a compiler holds constant even where it takes numbers for dynamic.
        compiling = torch.compiler.is_compiling()
        return RankSpec.parse(self._code) if compiling else RankSpec.decode(self._code)

    def _build_spec(self) -> RankSpec | None:
        """The operators' form of the loss; None for a class that is no loss by itself."""
        return None

    def _spec(self, form: Form, **fields: Any) -> RankSpec:
        return RankSpec(
            form=form,
            sft_weight=float(self.sft_weight),
            sft_reduction=self.sft_reduction,
            length_exponent=length_exponent(self.normalize),
            rank_weight=float(self.rank_weight),
            **fields,
        )


def choice(default: str, choices: Any, **options: Any) -> Any:
    """A keyword-only field that takes one of a Literal's ``choices``."""
    metadata = {"choices": get_args(choices)}
    return dataclasses.field(default=default, kw_only=True, metadata=metadata, **options)


def parameters(function: Callable[..., Any]) -> frozenset[str]:
    """Names of a function's parameters; none if it does not tell them."""
    try:
        return frozenset(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return frozenset()


_CHOICES = {"sft_reduction": get_args(Pooling)}
_POSITIVE = ("beta", "eta", "temperature", "top_k")
_NOT_NEGATIVE = ("sft_weight", "rank_weight")


def _check(owner: str, field: dataclasses.Field[Any], value: Any) -> None:
    name = field.name
    choices = field.metadata.get("choices") or _CHOICES.get(name)
    if choices:
        if value not in choices:
            expected = " or ".join(repr(choice) for choice in choices)
            raise ValueError(f"{owner}: {name} must be {expected}, got {value!r}")
        return
    if name == "normalize":
        check_normalize(f"{owner}: normalize", value)
        return
    if isinstance(field.default, bool):
        if not isinstance(value, bool):
            raise ValueError(f"{owner}: {name} must be True or False, got {value!r}")
        return
    if value is None and field.default is None:
        return
    if not isinstance(field.default, (int, float)) and name not in _POSITIVE:
        return  # an option of somebody's own loss
    whole = name == "top_k"
    number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not number or isinstance(value, float) and not math.isfinite(value):
        noun = "an integer" if whole else "a finite number"
        raise ValueError(f"{owner}: {name} must be {noun}, got {value!r}")
    if name in _POSITIVE and value <= 0:
        raise ValueError(f"{owner}: {name} must be positive, got {value!r}")
    if abs(value) > LARGEST or name in _POSITIVE and value < 1 / LARGEST:
        bounds = f"from {1 / LARGEST:g} to {LARGEST:g}" if name in _POSITIVE else f"±{LARGEST:g}"
        raise ValueError(f"{owner}: {name} must lie within {bounds}, got {value!r}")
    if name in _NOT_NEGATIVE and value < 0:
        raise ValueError(f"{owner}: {name} must not be negative, got {value!r}")
    if name == "label_smoothing" and not 0 <= value < 0.5:
        raise ValueError(f"{owner}: label_smoothing must lie in [0, 0.5), got {value!r}")
