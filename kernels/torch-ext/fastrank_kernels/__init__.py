"""Ranking losses over candidates that share a prompt: tensors in, tensors out.

`linear_ranking` goes from a `Projection` (hidden rows, head, labels) and rewards to the loss and
its gradients; `linear_logprobs` to differentiable token log-probabilities. From there
`token_ranking` is the same loss, `rank_tokens` its derivative by each log-probability, and
`segment_sum` and `rank_scores` lead to scores and any ranking term. The plain-torch `reference` is
the specification and the CPU implementation; on a GPU the same functions are Triton kernels around
the vendor's matrix products.
"""

from .autograd import (
    first_order_only,
    linear_logprobs,
    linear_ranking,
    rank_scores,
    rank_tokens,
    token_ranking,
)
from .dispatch import Backend, choose_backend
from .head_cast import reuse_head_cast
from .ops import segment_sum
from .projection import Projection
from .reference import RankResult, length_divisor, live_candidates, sft_weights
from .shards import VocabShard, agree_on_shard
from .spec import Form, MarginBy, RankSpec

__all__ = [
    "Backend",
    "Form",
    "MarginBy",
    "Projection",
    "RankResult",
    "RankSpec",
    "VocabShard",
    "agree_on_shard",
    "choose_backend",
    "first_order_only",
    "length_divisor",
    "linear_logprobs",
    "linear_ranking",
    "live_candidates",
    "rank_scores",
    "rank_tokens",
    "reuse_head_cast",
    "segment_sum",
    "sft_weights",
    "token_ranking",
]
