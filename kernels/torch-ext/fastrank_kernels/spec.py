"""A ranking loss as data: a few numbers and names.

Every loss of the family reaches the tokens only through the candidates' scores, and its score part
is one of six forms. A loss is therefore data (`RankSpec`) and not code: one reference and one
kernel serve the whole family. The ``torch.library`` operators take it as one string
(`RankSpec.encode`), which a compiler treats as a constant.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple

Form = Literal["pairwise", "staged", "softmax", "expected", "pointwise", "positions"]
MarginBy = Literal["constant", "reward", "rank"]


class RankSpec(NamedTuple):
    """One ranking loss as the operators take it.

    With ``u_i = score_scale * (s_i - reference_i)``, ``order`` the candidates by falling reward
    (ties by index) and ``q`` the target ``softmax(r / temperature)``, the ranking term of a group
    is ``rank_weight`` times

    - ``pairwise``: ``sum over r_i > r_j of w_ij * phi(u_i - u_j - m_ij)``;
    - ``staged``: ``sum over stages k of logsumexp_{i >= k}(a_ki * u_i) - a_kk * u_k`` in ``order``;
    - ``softmax``: ``-sum_i q_i * log softmax(u)_i``;
    - ``expected``: ``-sum_i softmax(u)_i * v_i``, v the rewards or q;
    - ``pointwise``: ``-sum_i [q_i * log sigmoid(u_i) + log sigmoid(-u_i) / n]``;
    - ``positions``: ``1 - DCG / ideal DCG`` with smooth places
      ``1 + sum_{j != i} sigmoid(u_j - u_i)``;

    and 0 for a group without a strict pair. The supervised term of a group is
    ``-sft_weight * f(n) * sum_t logp_t`` over the best candidate (its mean for ``"mean"``).
    """

    form: Form
    """Which of the ranking terms above."""
    phi: Literal["hinge", "logistic", "square"] = "hinge"
    """Pairwise: ``"hinge"`` relu(-z), ``"logistic"`` softplus(-z), ``"square"`` z²."""
    pairs: Literal["all", "best_worst"] = "all"
    """Pairwise: ``"all"``, or ``"best_worst"`` for the first and the last in order alone."""
    pair_weight: Literal["one", "lambda"] = "one"
    """Pairwise: ``"one"``, or ``"lambda"`` for LambdaRank's change of DCG (detached)."""
    stage_scale: Literal["one", "reward_gap"] = "one"
    """Staged: ``"one"`` (a = 1), or ``"reward_gap"`` (PRO: a_ki = r_k - r_i, a_kk the largest)."""
    top_k: int = 0
    """Staged: number of stages at most; 0 for all of them (n - 1)."""
    margin: float = 0.0
    """Pairwise: m, subtracted from every difference."""
    margin_by: MarginBy = "constant"
    """Pairwise: m_ij is m, or m times the pair's distance in ``"reward"`` or in ``"rank"``."""
    right: float = 1.0
    """Logistic: weight of ``phi(z)``, the pair as its rewards say."""
    wrong: float = 0.0
    """Logistic: weight of ``phi(-z)``, the same pair the other way round."""
    score_scale: float = 1.0
    """Multiplies the scores (less the reference's) before the loss."""
    temperature: float = 1.0
    """Of the target distribution over the rewards."""
    target: Literal["softmax", "reward"] = "softmax"
    """Expected: v is the target distribution, or the rewards as they are."""
    rank_weight: float = 1.0
    """Weight of the ranking term; 0 leaves it out."""
    sft_weight: float = 0.0
    """Weight of the supervised term on the best candidate; 0 leaves it out."""
    sft_growth: Literal["one", "square"] = "one"
    """``"one"``, or ``"square"``: the weight is multiplied by (n - 1)² (PRO)."""
    sft_reduction: Literal["mean", "sum"] = "mean"
    """The supervised term's ``"mean"`` or ``"sum"`` over the best candidate's tokens."""
    length_exponent: float = 1.0
    """α: a score is ``sum_t logp_t / |y|^α``, the mean for 1 and the sum for 0."""

    @property
    def leaves_rows_dead(self) -> bool:
        """Whether whole candidates can have a gradient of exactly zero, so that dropping their
        rows before the backward products can pay."""
        return self.form == "pairwise" and (self.phi == "hinge" or self.pairs == "best_worst")

    def encode(self) -> str:
        """The fields as one string."""
        # A compiler traces an f-string, but not str(), of a number that it does not hold constant.
        return " ".join([f"{field}" for field in self])

    @staticmethod
    def parse(text: str) -> RankSpec:
        """The inverse of `encode`, for code that a compiler traces."""
        kinds = [str, *map(type, RankSpec._field_defaults.values())]
        return RankSpec(*(kind(word) for kind, word in zip(kinds, text.split(), strict=True)))

    @staticmethod
    @lru_cache
    def decode(text: str) -> RankSpec:
        """The inverse of `encode`, cached."""
        return RankSpec.parse(text)
