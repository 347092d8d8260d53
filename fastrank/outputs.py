"""What goes through a prepared model: the base of its arguments, and its results, which are those
of the fused ranking loss too."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, NamedTuple

from torch import Tensor
from typing_extensions import Self, dataclass_transform


@dataclass_transform(eq_default=False, frozen_default=True, field_specifiers=(field,))
class Opaque:
    """Base of classes with fields that no engine looks into; instances are frozen and compared by
    identity.

    FSDP2 with a ``param_dtype`` rebuilds every dataclass, tuple, list and dictionary among the
    arguments of a wrapped module and casts the float tensors in it, so that rewards become bfloat16
    and identities are lost; other engines walk arguments in the same way. They know a dataclass by
    ``__dataclass_fields__``. Subclasses are declared like a frozen dataclass and do not have that
    mark, so every engine hands them on untouched.

    >>> class Pair(Opaque):
    ...     left: int
    ...     right: int = 0
    >>> Pair(1).replace(right=2)
    Pair(left=1, right=2)
    """

    field_names: ClassVar[tuple[str, ...]] = ()
    """Names of the fields, in the order of the constructor's arguments."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        made: Any = dataclass(eq=False, frozen=True)(cls)
        cls.field_names = tuple(known.name for known in fields(made))
        del made.__dataclass_fields__
        made.__replace__ = Opaque.replace  # ``copy.replace``; dataclass's own reads its mark

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed.

        Raises:
            TypeError: a name that is no field.
        """
        return type(self)(**{n: getattr(self, n) for n in self.field_names} | changes)


class RankingOutput(NamedTuple):
    """Result of `fastrank.linear_ranking_loss` and of a prepared model. Only ``loss`` carries
    gradients; the rest is for logging and metrics. float32 (float64 for float64 inputs)."""

    loss: Tensor
    """``rank_loss + sft_loss``: a scalar, or [G] for ``reduction="none"``."""
    rank_loss: Tensor
    """The ranking term, reduced like ``loss``."""
    sft_loss: Tensor
    """The supervised term with its weight, reduced like ``loss``."""
    scores: Tensor
    """[C] the model's own scores: mean (or sum) log-probability of each candidate."""
    token_logprobs: Tensor
    """[T] log-probability of each response token."""


class ScoreOutput(NamedTuple):
    """Result of ``model(pack=pack)``. Both carry gradients where gradients are enabled."""

    scores: Tensor
    """[C] mean (or sum) log-probability of each candidate, float32 (float64 for float64)."""
    token_logprobs: Tensor
    """[T] log-probability of each response token."""
