"""The ranking losses and their options; the operators compute them.

Write s_i for a candidate's score (its length-normalised log-probability under the model), r_i for
its reward. The losses differ only in the ranking term ℓ(s, r) of a prompt's group and in the
weight λ of the supervised term on the group's best candidate. Every loss is a frozen dataclass of
its hyper-parameters, so it can be compared, printed and used as a key; `Loss.spec` is the same loss
as the operators take it.

>>> import torch, fastrank
>>> scores = torch.tensor([-1.0, -3.0, -2.0], dtype=torch.float64, requires_grad=True)
>>> rewards = torch.tensor([0.1, 0.9, 0.5])
>>> loss = fastrank.ranking_loss(scores, rewards, loss=fastrank.RRHF())
>>> loss.item()          # (-1 + 3) + (-1 + 2) + (-2 + 3): all three pairs are the wrong way round
4.0
>>> loss.backward()
>>> scores.grad.tolist()
[2.0, -2.0, 0.0]

In every loss a group without a strict pair (one candidate, or all rewards equal) has ranking term 0
and gradient 0. Ties go by index where an order is needed; the best is the first of the highest.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from typing import Any, ClassVar, Literal, get_args

from fastrank_kernels import RankSpec

from .arguments import Normalize

Pairs = Literal["all", "best_worst"]

_CHOICES = {"sft_reduction": Normalize, "normalize": Normalize, "pairs": Pairs}
_POSITIVE = ("beta", "temperature", "top_k")


@dataclasses.dataclass(frozen=True)
class Loss:
    """The options of every ranking loss.

    Args:
        sft_weight: weight λ >= 0 of the supervised term ``-λ Σ_t logp_t`` of the best candidate.
        sft_reduction: ``"mean"`` or ``"sum"`` of that term over the candidate's tokens.
        normalize: a score is the ``"mean"`` or the ``"sum"`` of its tokens' log-probabilities.
    """

    _: dataclasses.KW_ONLY
    sft_weight: float = 0.0
    sft_reduction: Normalize = "mean"
    normalize: Normalize = "mean"

    _code: ClassVar[str | None]
    uses_reference: ClassVar[bool] = False
    """Whether a reference model's scores are subtracted from the model's own."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check(type(self).__name__, field.name, getattr(self, field.name))
        spec = self._build_spec()
        object.__setattr__(self, "_code", None if spec is None else spec.encode())

    def spec(self) -> RankSpec:
        """The same loss as the operators take it."""
        # From a string, which a compiler holds constant even where it takes numbers for dynamic.
        if self._code is None:
            raise TypeError(f"{type(self).__name__} is not a loss by itself; use one of {_names()}")
        return RankSpec.parse(self._code)

    def _build_spec(self) -> RankSpec | None:
        """The operators' form of the loss; None for a class that is no loss by itself."""
        return None

    def _spec(self, form: Literal["pairwise", "staged", "softmax"], **fields: Any) -> RankSpec:
        return RankSpec(
            form=form,
            sft_weight=float(self.sft_weight),
            sft_reduction=self.sft_reduction,
            normalize=self.normalize,
            **fields,
        )


@dataclasses.dataclass(frozen=True)
class PairwiseLoss(Loss):
    """Form A: ``Σ_{r_i > r_j} w_ij φ(s_i − s_j − m)``; tied rewards make no pair.

    Args:
        pairs: ``"all"``, or ``"best_worst"`` for the best against the worst candidate alone.
    """

    _: dataclasses.KW_ONLY
    pairs: Pairs = "all"

    def _pairwise(self, phi: Literal["hinge", "logistic", "square"], **fields: Any) -> RankSpec:
        return self._spec("pairwise", phi=phi, pairs=self.pairs, **fields)


@dataclasses.dataclass(frozen=True)
class RRHF(PairwiseLoss):
    """Rank Responses to align Human Feedback (arXiv:2304.05302, equations 2 to 4).

    ``ℓ = Σ_{r_i < r_j} max(0, s_i − s_j + margin)``, plus the best candidate's cross-entropy. The
    paper writes that term as a sum over tokens; the code that made its tables takes a mean, and
    so does the default here: ``sft_reduction="sum"`` is the formula.

    Args:
        margin: by how much a better candidate must lead; the paper has none.
    """

    margin: float = 0.0
    sft_weight: float = dataclasses.field(default=1.0, kw_only=True)

    def _build_spec(self) -> RankSpec:
        return self._pairwise("hinge", margin=float(self.margin))


@dataclasses.dataclass(frozen=True)
class PRO(Loss):
    """Preference Ranking Optimization (arXiv:2306.17492, equations 7 to 9).

    In order of falling reward, ``ℓ = Σ_{k<n} [logsumexp_{i≥k}(a_ki s_i) − a_kk s_k]`` with
    ``a_ki = r_k − r_i`` and ``a_kk = max_{i>k} a_ki``: rewards set the temperature, so their scale
    matters. The supervised weight is multiplied by ``(n − 1)²``, as in the paper.
    """

    sft_weight: float = dataclasses.field(default=0.05, kw_only=True)
    sft_reduction: Normalize = dataclasses.field(default="sum", kw_only=True)

    def _build_spec(self) -> RankSpec:
        return self._spec("staged", stage_scale="reward_gap", sft_growth="square")


@dataclasses.dataclass(frozen=True)
class RankNet(PairwiseLoss):
    """``Σ_{r_i > r_j} softplus(−(s_i − s_j))``: RankNet (Burges et al., 2005), which is the
    Bradley–Terry likelihood of every pair."""

    def _build_spec(self) -> RankSpec:
        return self._pairwise("logistic")


@dataclasses.dataclass(frozen=True)
class SLiC(PairwiseLoss):
    """``Σ_{r_i > r_j} max(0, margin − s_i + s_j)``: the rank calibration of SLiC-HF
    (arXiv:2305.10425, equation 1).

    Args:
        margin: δ, in units of the score.
    """

    margin: float = 1.0

    def _build_spec(self) -> RankSpec:
        return self._pairwise("hinge", margin=float(self.margin))


@dataclasses.dataclass(frozen=True)
class SimPO(PairwiseLoss):
    """``Σ_{r_i > r_j} softplus(−(β s_i − β s_j − γ))`` (arXiv:2405.14734, equation 6).

    Args:
        beta: β, the scale of the scores.
        gamma: γ, the target margin of the scaled scores.
    """

    beta: float = 2.0
    gamma: float = 1.0

    def _build_spec(self) -> RankSpec:
        return self._pairwise("logistic", score_scale=float(self.beta), margin=float(self.gamma))


@dataclasses.dataclass(frozen=True)
class IPO(PairwiseLoss):
    """``Σ_{r_i > r_j} (s_i − s_j − 1/(2β))²`` on scores less the reference's
    (arXiv:2310.12036, equation 17).

    Args:
        beta: β, the strength of the pull towards the reference.
    """

    beta: float = 0.1
    uses_reference: ClassVar[bool] = True

    def _build_spec(self) -> RankSpec:
        return self._pairwise("square", margin=1.0 / (2.0 * self.beta))


@dataclasses.dataclass(frozen=True)
class DPO(PairwiseLoss):
    """``Σ_{r_i > r_j} softplus(−β (s_i − s_j))`` on scores less the reference's, scores being sums
    of log-probabilities (arXiv:2305.18290, equation 7; all pairs of a ranking, or best and worst).

    Args:
        beta: β, the strength of the pull towards the reference.
    """

    beta: float = 0.1
    normalize: Normalize = dataclasses.field(default="sum", kw_only=True)
    uses_reference: ClassVar[bool] = True

    def _build_spec(self) -> RankSpec:
        return self._pairwise("logistic", score_scale=float(self.beta))


@dataclasses.dataclass(frozen=True)
class LambdaRank(PairwiseLoss):
    """RankNet's pairs weighted by the change of DCG that swapping them would make (LiPO-λ,
    arXiv:2402.01878, equations 9 and 10); the weights carry no gradient."""

    def _build_spec(self) -> RankSpec:
        return self._pairwise("logistic", pair_weight="lambda")


@dataclasses.dataclass(frozen=True)
class ListMLE(Loss):
    """The Plackett–Luce likelihood of the order, ``Σ_{k≤K} [logsumexp_{i≥k}(s_i) − s_k]``
    (Xia et al., 2008). Partial ties go by index, so the input's order matters there.

    Args:
        top_k: K, how many places are modelled; None for all n − 1.
    """

    top_k: int | None = None

    def _build_spec(self) -> RankSpec:
        return self._spec("staged", top_k=self.top_k or 0)


@dataclasses.dataclass(frozen=True)
class ListNet(Loss):
    """``−Σ_i q_i log softmax(s)_i`` with ``q = softmax(r / temperature)``: ListNet's top-one form
    (Cao et al., 2007), which is also InfoNCA (arXiv:2402.05369).

    Args:
        temperature: α, of the target distribution, in units of the reward.
    """

    temperature: float = 1.0

    def _build_spec(self) -> RankSpec:
        return self._spec("softmax", temperature=float(self.temperature))


LOSSES: dict[str, type[Loss]] = {
    cls.__name__.lower(): cls
    for cls in (RRHF, PRO, RankNet, SLiC, SimPO, IPO, DPO, LambdaRank, ListMLE, ListNet)
}
"""Every loss by its lower-case name."""


def loss_from_name(name: str, **options: Any) -> Loss:
    """The loss called ``name`` (any case) with ``options`` as its hyper-parameters.

    Raises:
        ValueError: no such loss, no such option, or a value out of range; the text names the
            nearest.

    >>> loss_from_name("rrhf", margin=0.1)
    RRHF(sft_weight=1.0, sft_reduction='mean', normalize='mean', pairs='all', margin=0.1)
    """
    cls = LOSSES.get(name.lower())
    if cls is None:
        raise ValueError(f"loss must be one of {_names()}, got {name!r}{_hint(name, LOSSES)}")
    known = {field.name: field for field in dataclasses.fields(cls)}
    for option in options:
        if option not in known:
            raise ValueError(
                f"{cls.__name__} has the options {', '.join(known)}, got {option!r}"
                f"{_hint(option, known)}"
            )
    return cls(**options)


def _check(owner: str, name: str, value: Any) -> None:
    if name in _CHOICES:
        choices = get_args(_CHOICES[name])
        if value not in choices:
            expected = " or ".join(repr(choice) for choice in choices)
            raise ValueError(f"{owner}: {name} must be {expected}, got {value!r}")
        return
    if name == "top_k" and value is None:
        return
    whole = name == "top_k"
    number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not (number and math.isfinite(value)):
        noun = "an integer" if whole else "a finite number"
        raise ValueError(f"{owner}: {name} must be {noun}, got {value!r}")
    if name in _POSITIVE and value <= 0:
        raise ValueError(f"{owner}: {name} must be positive, got {value!r}")
    if name == "sft_weight" and value < 0:
        raise ValueError(f"{owner}: sft_weight must not be negative, got {value!r}")


def _names() -> str:
    return ", ".join(LOSSES)


def _hint(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name.lower(), list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
