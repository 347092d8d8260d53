"""Losses as users write them, each the same as one of the library's."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from fastrank import FunctionLoss


def rrhf(scores: Tensor, rewards: Tensor) -> Tensor:
    difference = scores[:, None] - scores[None, :]
    return torch.relu(-difference)[rewards[:, None] > rewards[None, :]].sum()


def batched_rrhf(scores: Tensor, rewards: Tensor, cu_groups: Tensor) -> Tensor:
    bounds = cu_groups.tolist()
    return torch.stack([rrhf(scores[a:b], rewards[a:b]) for a, b in pairwise(bounds)])


def dpo(scores: Tensor, rewards: Tensor, reference_scores: Tensor) -> Tensor:
    ratio = 0.1 * (scores - reference_scores)
    difference = ratio[:, None] - ratio[None, :]
    better = rewards[:, None] > rewards[None, :]
    return -torch.nn.functional.logsigmoid(difference)[better].sum()


def forgetful(scores: Tensor, rewards: Tensor) -> Tensor:
    options: dict[str, float] = {}
    return scores.sum() * options["gamma"]


LOSS = FunctionLoss(rrhf, sft_weight=1.0)
