"""Token log-probabilities from logits that the model makes itself.

For heads that the fused loss cannot multiply (adapters, quantised weights, unknown scaling). Costs
the memory of all response rows' logits; values and gradients are the same.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastrank.data.packing import Pack


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
