"""The logits path: rankings from logits that the model makes itself.

For heads that the fused loss cannot multiply (adapters, quantised weights, unknown scaling). Costs
the memory of all response rows' logits; the values and gradients are the same.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastrank.data.packing import Pack
from fastrank.logprobs import sequence_scores
from fastrank.losses import Loss
from fastrank.outputs import RankingOutput
from fastrank.ranking import ranking_loss, reduce_groups
from fastrank_kernels import sft_weights


def keeps_logits(model: PreTrainedModel) -> bool:
    """Whether the model can make the logits of chosen rows only."""
    return "logits_to_keep" in inspect.signature(type(model).forward).parameters


def model_logprobs(
    model: PreTrainedModel, forward: Callable[..., Any], inputs: dict[str, Any], pack: Pack
) -> Tensor:
    """Log-probability of every label by the model's own forward: [T], in at least float32."""
    num_columns = pack.input_ids.shape[1]
    rows, index = torch.unique(pack.rows, return_inverse=True)
    if pack.shared_prompts and keeps_logits(model):
        logits = forward(**inputs, logits_to_keep=rows).logits[0]
    else:
        logits = forward(**inputs).logits
        logits = logits[rows // num_columns, rows % num_columns]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits[index, pack.labels] - torch.logsumexp(logits, dim=-1)[index]


def ranking_from_logprobs(
    token_logprobs: Tensor, pack: Pack, loss: Loss, reduction: str
) -> RankingOutput:
    """What `linear_ranking_loss` computes, from log-probabilities that exist already."""
    cu_groups, rewards = pack.cu_groups, pack.rewards.to(token_logprobs.dtype)
    scores = sequence_scores(token_logprobs, pack.cu_responses, normalize=loss.normalize)
    compared = scores
    if loss.uses_reference and pack.reference_scores is not None:
        compared = scores - pack.reference_scores.to(scores.dtype)
    rank = ranking_loss(compared, rewards, loss=loss, cu_groups=cu_groups, reduction="none")
    spec = loss.spec()
    supervised = sequence_scores(token_logprobs, pack.cu_responses, normalize=loss.sft_reduction)
    weights = sft_weights(rewards, cu_groups, spec, scores.dtype)
    group = torch.repeat_interleave(
        torch.arange(pack.num_groups, device=scores.device),
        (pack.cu_groups_device[1:] - pack.cu_groups_device[:-1]).long(),
        output_size=pack.num_candidates,
    )
    sft = torch.zeros_like(rank).index_add(0, group, -weights * supervised)
    rank, sft = reduce_groups(rank, reduction), reduce_groups(sft, reduction)
    return RankingOutput(
        rank + sft, rank.detach(), sft.detach(), scores.detach(), token_logprobs.detach()
    )
