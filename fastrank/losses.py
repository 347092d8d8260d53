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
from typing import Any, Literal

from fastrank_kernels import MarginBy, RankSpec

from .arguments import Normalize, Pooling
from .loss import Loss, choice

__all__ = [
    "DPO", "IPO", "LIRE", "LOSSES", "NCA", "PRO", "REBEL", "RRHF", "ApproxNDCG", "LambdaRank",
    "ListMLE", "ListNet", "Loss", "RankNet", "SLiC", "SimPO", "loss_from_name",
]  # fmt: skip

Pairs = Literal["all", "best_worst"]
StageScale = Literal["reward_gap", "one"]
ExpectedValue = Literal["reward", "softmax"]


# ---- pairs ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, repr=False)
class PairwiseLoss(Loss):
    """``Σ_{r_i > r_j} w_ij φ(s_i − s_j − m_ij)``; tied rewards make no pair.

    Args:
        pairs: ``"all"``, or ``"best_worst"`` for the best against the worst candidate alone.
    """

    _: dataclasses.KW_ONLY
    pairs: Pairs = choice("all", Pairs)

    def _pairwise(self, phi: Literal["hinge", "logistic", "square"], **fields: Any) -> RankSpec:
        return self._spec("pairwise", phi=phi, pairs=self.pairs, **fields)


@dataclasses.dataclass(frozen=True, repr=False)
class MarginLoss(PairwiseLoss):
    """A pairwise loss in which the better candidate has to lead by a margin.

    Args:
        margin_by: ``"constant"``, the same margin m for every pair; ``"reward"``, ``m (r_i − r_j)``
            (ODPO's offset, arXiv:2402.10571, with the identity for f; its authors' code takes the
            logarithm of the difference); or ``"rank"``, m times the distance of the two in the
            order of falling rewards, ties by index (BRIO, arXiv:2203.16804, whose code takes the
            mean over the pairs of each distance).
    """

    margin_by: MarginBy = choice("constant", MarginBy)

    def _with_margin(
        self, phi: Literal["hinge", "logistic"], margin: float, **fields: Any
    ) -> RankSpec:
        if self.margin_by != "constant" and not margin:
            raise ValueError(
                f"{type(self).__name__}: margin_by={self.margin_by!r} needs a margin other than 0"
            )
        return self._pairwise(phi, margin=float(margin), margin_by=self.margin_by, **fields)


@dataclasses.dataclass(frozen=True, repr=False)
class LogisticLoss(MarginLoss):
    """A pairwise loss with φ = softplus, the likelihood of each pair.

    Args:
        label_smoothing: ε, the share of pairs that are believed to be the wrong way round, in
            [0, 0.5): ``(1 − ε) φ(z) + ε φ(−z)`` (conservative DPO, a note of DPO's authors).
        robust: with ``label_smoothing``, ``[(1 − ε) φ(z) − ε φ(−z)] / (1 − 2ε)`` instead, whose
            mean over such pairs is the loss of the right ones (robust DPO, arXiv:2403.00409).
    """

    _: dataclasses.KW_ONLY
    label_smoothing: float = 0.0
    robust: bool = False

    def _logistic(self, *, scale: float, margin: float) -> RankSpec:
        right, wrong = 1.0 - self.label_smoothing, float(self.label_smoothing)
        if self.robust:
            if not self.label_smoothing:
                raise ValueError(
                    f"{type(self).__name__}: robust=True needs a label_smoothing other than 0"
                )
            right, wrong = right / (right - wrong), -wrong / (right - wrong)
        return self._with_margin(
            "logistic", margin, score_scale=float(scale), right=right, wrong=wrong
        )


@dataclasses.dataclass(frozen=True, repr=False)
class RRHF(MarginLoss):
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
        return self._with_margin("hinge", self.margin)


@dataclasses.dataclass(frozen=True, repr=False)
class SLiC(MarginLoss):
    """``Σ_{r_i > r_j} max(0, margin − s_i + s_j)``: the rank calibration of SLiC-HF
    (arXiv:2305.10425, equation 1).

    Args:
        margin: δ, in units of the score.
    """

    margin: float = 1.0

    def _build_spec(self) -> RankSpec:
        return self._with_margin("hinge", self.margin)


@dataclasses.dataclass(frozen=True, repr=False)
class RankNet(LogisticLoss):
    """``Σ_{r_i > r_j} softplus(−(β s_i − β s_j − margin))``: RankNet (Burges et al., 2005), which
    is the Bradley–Terry likelihood of every pair.

    Args:
        beta: β, the scale of the scores.
        margin: by how much the better one must lead; none in the paper.
    """

    beta: float = 1.0
    margin: float = 0.0

    def _build_spec(self) -> RankSpec:
        return self._logistic(scale=self.beta, margin=self.margin)


@dataclasses.dataclass(frozen=True, repr=False)
class SimPO(LogisticLoss):
    """``Σ_{r_i > r_j} softplus(−(β s_i − β s_j − γ))`` (arXiv:2405.14734, equation 6).

    Args:
        beta: β, the scale of the scores.
        gamma: γ, the target margin of the scaled scores.
    """

    beta: float = 2.0
    gamma: float = 1.0

    def _build_spec(self) -> RankSpec:
        return self._logistic(scale=self.beta, margin=self.gamma)


@dataclasses.dataclass(frozen=True, repr=False)
class DPO(LogisticLoss):
    """``Σ_{r_i > r_j} softplus(−(β (s_i − s_j) − margin))`` on scores less the reference's, scores
    being sums of log-probabilities (arXiv:2305.18290, equation 7; all pairs of a ranking, or best
    and worst).

    Args:
        beta: β, the strength of the pull towards the reference.
        margin: by how much the better one must lead, in units of β times a log-ratio; none in the
            paper. With ``margin_by="reward"`` this is ODPO with the difference of the rewards
            itself as the offset, margin being its α.
    """

    beta: float = 0.1
    margin: float = 0.0
    normalize: Normalize = dataclasses.field(default="sum", kw_only=True)
    uses_reference: bool = dataclasses.field(default=True, kw_only=True)

    def _build_spec(self) -> RankSpec:
        return self._logistic(scale=self.beta, margin=self.margin)


@dataclasses.dataclass(frozen=True, repr=False)
class IPO(PairwiseLoss):
    """``Σ_{r_i > r_j} (s_i − s_j − 1/(2β))²`` on scores less the reference's
    (arXiv:2310.12036, equation 17).

    Args:
        beta: β, the strength of the pull towards the reference.
    """

    beta: float = 0.1
    uses_reference: bool = dataclasses.field(default=True, kw_only=True)

    def _build_spec(self) -> RankSpec:
        return self._pairwise("square", margin=1.0 / (2.0 * self.beta))


@dataclasses.dataclass(frozen=True, repr=False)
class REBEL(PairwiseLoss):
    """``Σ_{r_i > r_j} ((s_i − s_j) / η − (r_i − r_j))²`` on scores less the reference's, scores
    being sums of log-probabilities (arXiv:2404.16767, algorithm 1): the log-ratios of a pair are
    regressed on its rewards. The reference is the policy that sampled the responses. The authors'
    code multiplies the loss by η².

    Args:
        eta: η, how far a step may move the policy.

    >>> import torch, fastrank
    >>> ratios, rewards = torch.tensor([2.0, 1.0]), torch.tensor([3.0, 1.0])
    >>> fastrank.ranking_loss(ratios, rewards, loss=fastrank.REBEL())  # (1 - 2)²
    tensor(1.)
    """

    eta: float = 1.0
    normalize: Normalize = dataclasses.field(default="sum", kw_only=True)
    uses_reference: bool = dataclasses.field(default=True, kw_only=True)

    @property
    def reward_scale(self) -> float:
        return 1.0 / self.eta

    def _build_spec(self) -> RankSpec:
        return self._pairwise(
            "square", score_scale=self.reward_scale, margin=1.0, margin_by="reward"
        )


@dataclasses.dataclass(frozen=True, repr=False)
class LambdaRank(PairwiseLoss):
    """RankNet's pairs weighted by the change of DCG that swapping them would make (LiPO-λ,
    arXiv:2402.01878, equations 9 and 10); the weights carry no gradient.

    Args:
        beta: β, the scale of the scores.
    """

    beta: float = 1.0

    def _build_spec(self) -> RankSpec:
        return self._pairwise("logistic", pair_weight="lambda", score_scale=float(self.beta))


# ---- lists ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, repr=False)
class PRO(Loss):
    """Preference Ranking Optimization (arXiv:2306.17492, equations 7 to 9).

    In order of falling reward, ``ℓ = Σ_{k≤K} [logsumexp_{i≥k}(a_ki s_i) − a_kk s_k]`` with
    ``a_ki = r_k − r_i`` and ``a_kk = max_{i>k} a_ki``: rewards set the temperature, so their scale
    matters. The supervised weight is multiplied by ``(n − 1)²``, as in the paper.

    Args:
        top_k: K, how many stages are compared; None for all n − 1, 1 for the best against all
            others (the paper's ablation without the terms k > 1).
        stage_scale: ``"reward_gap"``, or ``"one"`` for a = 1 (the ablation without temperatures).
    """

    top_k: int | None = None
    stage_scale: StageScale = choice("reward_gap", StageScale)
    sft_weight: float = dataclasses.field(default=0.05, kw_only=True)
    sft_reduction: Pooling = dataclasses.field(default="sum", kw_only=True)

    def _build_spec(self) -> RankSpec:
        return self._spec(
            "staged", stage_scale=self.stage_scale, top_k=self.top_k or 0, sft_growth="square"
        )


@dataclasses.dataclass(frozen=True, repr=False)
class ListMLE(Loss):
    """The Plackett–Luce likelihood of the order, ``Σ_{k≤K} [logsumexp_{i≥k}(β s_i) − β s_k]``
    (Xia et al., 2008). Partial ties go by index, so the input's order matters there.

    With ``uses_reference=True`` and ``normalize="sum"`` this is DPO of a ranking under the
    Plackett–Luce model (arXiv:2305.18290, appendix A.3).

    Args:
        top_k: K, how many places are modelled; None for all n − 1.
        beta: β, the scale of the scores; with a reference the strength of the pull towards it.

    >>> import torch, fastrank
    >>> loss = fastrank.ListMLE(beta=0.1, uses_reference=True, normalize="sum")
    >>> fastrank.ranking_loss(torch.zeros(3), torch.tensor([1.0, 3.0, 2.0]), loss=loss)  # log 3!
    tensor(1.7918)
    """

    top_k: int | None = None
    beta: float = 1.0

    def _build_spec(self) -> RankSpec:
        return self._spec("staged", top_k=self.top_k or 0, score_scale=float(self.beta))


@dataclasses.dataclass(frozen=True, repr=False)
class ListNet(Loss):
    """``−Σ_i q_i log softmax(β s)_i`` with ``q = softmax(r / temperature)``: ListNet's top-one form
    (Cao et al., 2007).

    With ``uses_reference=True`` and ``normalize="sum"`` this is InfoNCA (arXiv:2402.05369); the
    authors' code calls the temperature ``temperature_alpha``.

    Args:
        temperature: α, of the target distribution, in units of the reward.
        beta: β, the scale of the scores; with a reference the strength of the pull towards it.
    """

    temperature: float = 1.0
    beta: float = 1.0

    def _build_spec(self) -> RankSpec:
        return self._spec(
            "softmax", temperature=float(self.temperature), score_scale=float(self.beta)
        )


@dataclasses.dataclass(frozen=True, repr=False)
class NCA(Loss):
    """Noise contrastive alignment (arXiv:2402.05369), on scores less the reference's, scores being
    sums of log-probabilities.

    ``ℓ = −Σ_i [q_i log σ(β s_i) + (1/n) log σ(−β s_i)]`` with ``q = softmax(r / temperature)``.
    Each candidate is compared with the reference and not with the others: unlike every other loss
    here, this one changes when all scores rise together, which keeps the likelihood of good
    candidates from falling.

    Args:
        temperature: α, of the target distribution, in units of the reward.
        beta: β, the strength of the pull towards the reference.

    >>> import torch, fastrank
    >>> fastrank.ranking_loss(torch.zeros(2), torch.tensor([1.0, 0.0]), loss=fastrank.NCA())
    tensor(1.3863)
    """

    temperature: float = 1.0
    beta: float = 0.01
    normalize: Normalize = dataclasses.field(default="sum", kw_only=True)
    uses_reference: bool = dataclasses.field(default=True, kw_only=True)

    def _build_spec(self) -> RankSpec:
        return self._spec(
            "pointwise", temperature=float(self.temperature), score_scale=float(self.beta)
        )


@dataclasses.dataclass(frozen=True, repr=False)
class LIRE(Loss):
    """Listwise reward enhancement (arXiv:2405.13516): the negative expected reward
    ``ℓ = −Σ_i softmax(s / temperature)_i v_i`` over the list, scores being sums of
    log-probabilities.

    A shift of all rewards changes the value and not the gradient. It has no entropy term: it
    prefers the best candidate alone.

    Args:
        temperature: T, of the distribution over the candidates; 2 in the authors' code.
        value: v, the ``"reward"`` as it is, or ``"softmax"`` for its softmax within the group, as
            in the authors' code. That code divides by the number of prompts, as
            ``reduction="mean"`` does.
    """

    temperature: float = 2.0
    value: ExpectedValue = choice("reward", ExpectedValue)
    normalize: Normalize = dataclasses.field(default="sum", kw_only=True)

    def _build_spec(self) -> RankSpec:
        return self._spec("expected", score_scale=1.0 / self.temperature, target=self.value)


@dataclasses.dataclass(frozen=True, repr=False)
class ApproxNDCG(Loss):
    """``1 − NDCG`` with smooth places (Qin, Liu and Li, 2010, as in arXiv:2410.04346).

    ``π_i = 1 + Σ_{j≠i} σ((s_j − s_i) / temperature)`` stands for a candidate's place, and
    ``NDCG = Σ_i (2^{ψ_i} − 1) / log2(1 + π_i)`` over its value in the order of the rewards, ψ the
    reward scaled to [0, 1] in its group as in `LambdaRank`.

    Args:
        temperature: of the places, in units of the score: small values make steps of them.

    >>> import torch, fastrank
    >>> rewards = torch.tensor([2.0, 1.0, 0.0])
    >>> loss = fastrank.ApproxNDCG(temperature=0.01)
    >>> fastrank.ranking_loss(torch.tensor([-1.0, -2.0, -3.0]), rewards, loss=loss)
    tensor(0.)
    """

    temperature: float = 1.0

    def _build_spec(self) -> RankSpec:
        return self._spec("positions", score_scale=1.0 / self.temperature)


LOSSES: dict[str, type[Loss]] = {
    cls.__name__.lower(): cls
    for cls in (
        RRHF,
        PRO,
        RankNet,
        SLiC,
        SimPO,
        IPO,
        DPO,
        REBEL,
        LambdaRank,
        ListMLE,
        ListNet,
        NCA,
        LIRE,
        ApproxNDCG,
    )  # fmt: skip
}
"""Every loss by its lower-case name."""


def loss_from_name(name: str, **options: Any) -> Loss:
    """The loss called ``name`` (any case) with ``options`` as its hyper-parameters.

    Raises:
        ValueError: no such loss, no such option, or a value out of range; the text names the
            nearest.

    >>> loss_from_name("rrhf", margin=0.1)
    RRHF(margin=0.1)
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


def _names() -> str:
    return ", ".join(LOSSES)


def _hint(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name.lower(), list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
