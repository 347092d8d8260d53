"""What the papers' own scripts compute, written anew: the baselines that people start from.

RRHF's script (arXiv:2304.05302) takes one prompt a batch, projects every position of the padded
rows, copies the log-softmax, writes 0 over the label -100 before it counts and therefore divides
every candidate by the padded length; its supervised term is a mean over the padded length too.
PRO's script (arXiv:2306.17492) runs one forward a candidate, keeps all their logits until one
backward, and has no log-sum-exp but log(1e-10 + sum of exponentials). Both are other functions than
fastrank's, so they are checked against float64 evaluations of their own formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100


def rrhf_from_logits(logits: Tensor, labels: Tensor, rewards: Tensor) -> Tensor:
    """One prompt: ``logits`` [n, L, V] of padded rows, ``labels`` [n, L] already shifted (-100
    where nothing is predicted), ``rewards`` [n]."""
    everything = F.log_softmax(logits, dim=-1, dtype=_wide(logits)).clone()
    wanted = labels != IGNORED
    labels = labels.masked_fill(~wanted, 0)
    per_token = everything.gather(-1, labels[..., None]).squeeze(-1) * wanted
    scores = per_token.sum(dim=-1) / labels.shape[1]
    return rrhf_from_scores(scores, rewards) - per_token[rewards.argmax()].mean()


def rrhf_from_scores(scores: Tensor, rewards: Tensor) -> Tensor:
    """The ranking term of one prompt, ``scores`` and ``rewards`` [n]."""
    difference = scores[None, :] - scores[:, None]
    reward_difference = rewards[None, :] - rewards[:, None]
    wrong = (reward_difference > 0) & (difference < 0)
    return -difference[wrong].sum()


def pro_from_forwards(
    forwards: Sequence[Callable[[], Tensor]], labels: Tensor, rewards: Tensor
) -> Tensor:
    """One prompt: each of ``forwards`` gives one candidate's logits [1, L, V]; ``labels`` [n, L]
    shifted; ``rewards`` [n] falling, the first candidate is the supervised one."""
    sums, counts = [], []
    for candidate, forward in enumerate(forwards):
        logits = forward()
        everything = F.log_softmax(logits, dim=-1, dtype=_wide(logits))
        wanted = labels[candidate] != IGNORED
        target = labels[candidate].masked_fill(~wanted, 0)
        per_token = everything[0].gather(-1, target[:, None]).squeeze(-1)
        sums.append(torch.where(wanted, per_token, torch.zeros_like(per_token)).sum())
        counts.append(wanted.sum())
    total = torch.stack(sums)
    weight = 0.05 * (len(forwards) - 1) ** 2
    return pro_from_scores(total / torch.stack(counts), rewards) - weight * total[0]


def pro_from_scores(scores: Tensor, rewards: Tensor) -> Tensor:
    """The ranking term of one prompt, in order of falling ``rewards`` [n]."""
    loss = scores.new_zeros(())
    for k in range(len(scores) - 1):
        gaps = rewards[k] - rewards[k + 1 :]
        largest = gaps.max()
        own = torch.exp(scores[k] * largest)
        others = torch.exp(scores[k + 1 :] * gaps).sum()
        loss = loss + torch.log(1e-10 + own + others) - scores[k] * largest
    return loss


def _wide(logits: Tensor) -> torch.dtype:
    """float32 at least: autocast runs log_softmax in float32."""
    return torch.promote_types(logits.dtype, torch.float32)
