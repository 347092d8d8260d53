"""Ranking losses over candidates that share a prompt: tensors in, tensors out.

`linear_ranking` goes from hidden rows, head and rewards to the loss and its gradients;
`linear_logprobs` to differentiable token log-probabilities; `segment_sum` and `rank_scores`
from there to scores and any ranking term; `rank_tokens` from finished log-probabilities to the
derivative by each of them. The plain-torch `reference` is the specification and the
CPU implementation; on a GPU the same functions are Triton kernels around the vendor's
matrix products.
"""

from .autograd import linear_logprobs, linear_ranking, rank_scores
from .coefficients import rank_tokens
from .ops import choose_backend, segment_sum
from .reference import sft_weights
from .spec import RankSpec

__all__ = [
    "RankSpec",
    "choose_backend",
    "linear_logprobs",
    "linear_ranking",
    "rank_scores",
    "rank_tokens",
    "segment_sum",
    "sft_weights",
]
