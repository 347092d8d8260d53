"""The losses without fastrank: as a competent user writes them, and as the papers' scripts do.

The plain formulas are the specification of the gate: every peer gets its token log-probabilities in
its own way and goes on from here, and in float64 the same formulas give the values that results are
held against. Nothing here uses fastrank, so a mistake in one of the two shows as a red gate.

The published scripts, written anew, are the baselines that people start from. RRHF's script
(arXiv:2304.05302) takes one prompt per batch, projects every position of the padded rows, copies
the log-softmax, writes 0 over the label -100 before it counts and therefore divides every candidate
by the padded length; its supervised term is a mean over the padded length too. PRO's script
(arXiv:2306.17492) runs one forward pass per candidate, keeps all their logits until one backward
pass, and has no log-sum-exp but log(1e-10 + sum of exponentials). Both are other functions than
fastrank's, so they are checked against float64 evaluations of their own formulas.

Shapes: G groups of n candidates with R response tokens; L padded positions; V vocabulary entries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100

LossName = Literal["rrhf", "pro"]


# ---- plain PyTorch -------------------------------------------------------------------------------


def label_logprobs(logits: Tensor, labels: Tensor) -> Tensor:
    """[T] log-probabilities of ``labels`` [T] under ``logits`` [T, V], in float32 at least."""
    logprobs = F.log_softmax(logits, dim=-1, dtype=_wide(logits))
    return logprobs.gather(1, labels[:, None]).squeeze(1)


def loss_from_logprobs(logprobs: Tensor, rewards: Tensor, loss: LossName) -> Tensor:
    """The whole loss, mean over groups, from ``logprobs`` [G, n, R] and ``rewards`` [G, n]:
    ``"rrhf"`` with the mean of the best candidate's tokens as its supervised term, ``"pro"`` with
    ``0.05 (n - 1)²`` times their sum."""
    scores = logprobs.mean(dim=-1)
    best = rewards.argmax(dim=1)
    best_tokens = logprobs[torch.arange(len(best), device=best.device), best]
    if loss == "rrhf":
        supervised = -best_tokens.mean(dim=-1)
    else:
        supervised = -0.05 * (scores.shape[1] - 1) ** 2 * best_tokens.sum(dim=-1)
    return (ranking_term(scores, rewards, loss) + supervised).mean()


def ranking_term(scores: Tensor, rewards: Tensor, loss: LossName) -> Tensor:
    """[G] the ranking term of ``scores`` [G, n] under ``rewards`` [G, n]."""
    return {"rrhf": _rrhf, "pro": _pro}[loss](scores, rewards)


def _rrhf(scores: Tensor, rewards: Tensor) -> Tensor:
    """Sum over r_i < r_j of max(0, s_i - s_j)."""
    difference = scores[:, :, None] - scores[:, None, :]
    counts = rewards[:, :, None] < rewards[:, None, :]
    return (torch.relu(difference) * counts).sum(dim=(1, 2))


def _pro(scores: Tensor, rewards: Tensor) -> Tensor:
    """Sum over k of logsumexp_{i >= k}(a_ki s_i) - a_kk s_k, by falling reward; a stage without a
    strictly worse candidate is left out."""
    rewards, order = rewards.sort(dim=1, descending=True, stable=True)
    scores = scores.gather(1, order)
    total = torch.zeros_like(scores[:, 0])
    for k in range(scores.shape[1] - 1):
        gaps = rewards[:, k, None] - rewards[:, k + 1 :]
        largest = gaps.max(dim=1).values
        own = largest * scores[:, k]
        others = gaps * scores[:, k + 1 :]
        stage = torch.logsumexp(torch.cat([own[:, None], others], dim=1), dim=1) - own
        total = total + torch.where(largest > 0, stage, torch.zeros_like(stage))
    return total


# ---- the published scripts -----------------------------------------------------------------------


def published_loss(
    forward: Callable[[Tensor], Tensor],
    inputs: Tensor,
    labels: Tensor,
    rewards: Tensor,
    loss: LossName,
) -> Tensor:
    """One prompt by a published script.

    Args:
        forward: from some of the inputs [m, L, ...] to their logits [m, L, V].
        inputs: [n, L, ...], the padded rows of all candidates.
        labels: [n, L], already shifted, `IGNORED` where nothing is predicted.
        rewards: [n].
        loss: whose script.
    """
    if loss == "rrhf":
        return published_rrhf(forward(inputs), labels, rewards)
    order = rewards.argsort(descending=True, stable=True)
    forwards = [partial(forward, inputs[i : i + 1]) for i in order.tolist()]
    return published_pro(forwards, labels[order], rewards[order])


def published_rrhf(logits: Tensor, labels: Tensor, rewards: Tensor) -> Tensor:
    """One prompt: ``logits`` [n, L, V], ``labels`` [n, L], ``rewards`` [n]."""
    everything = F.log_softmax(logits, dim=-1, dtype=_wide(logits)).clone()
    wanted = labels != IGNORED
    labels = labels.masked_fill(~wanted, 0)
    per_token = everything.gather(-1, labels[..., None]).squeeze(-1) * wanted
    return published_rrhf_from_logprobs(per_token, rewards, labels.shape[1])


def published_rrhf_from_logprobs(logprobs: Tensor, rewards: Tensor, length: int) -> Tensor:
    """The same from token log-probabilities, 0 in the padding, of rows padded to ``length``."""
    scores = logprobs.sum(dim=-1) / length
    return published_rrhf_term(scores, rewards) - logprobs[rewards.argmax()].sum() / length


def published_rrhf_term(scores: Tensor, rewards: Tensor) -> Tensor:
    """The ranking term of one prompt, ``scores`` and ``rewards`` [n]."""
    difference = scores[None, :] - scores[:, None]
    reward_difference = rewards[None, :] - rewards[:, None]
    wrong = (reward_difference > 0) & (difference < 0)
    return -difference[wrong].sum()


def published_pro(
    forwards: Sequence[Callable[[], Tensor]], labels: Tensor, rewards: Tensor
) -> Tensor:
    """One prompt: each of ``forwards`` gives one candidate's logits [1, L, V]; ``labels`` [n, L];
    ``rewards`` [n] falling, the first candidate is the supervised one."""
    sums, counts = [], []
    for candidate, forward in enumerate(forwards):
        logits = forward()
        everything = F.log_softmax(logits, dim=-1, dtype=_wide(logits))
        wanted = labels[candidate] != IGNORED
        target = labels[candidate].masked_fill(~wanted, 0)
        per_token = everything[0].gather(-1, target[:, None]).squeeze(-1)
        sums.append(torch.where(wanted, per_token, torch.zeros_like(per_token)).sum())
        counts.append(wanted.sum())
    return published_pro_from_sums(torch.stack(sums), torch.stack(counts), rewards)


def published_pro_from_sums(sums: Tensor, counts: Tensor, rewards: Tensor) -> Tensor:
    """The same from each candidate's summed log-probability and number of tokens, [n] each."""
    weight = 0.05 * (len(sums) - 1) ** 2
    return published_pro_term(sums / counts, rewards) - weight * sums[0]


def published_pro_term(scores: Tensor, rewards: Tensor) -> Tensor:
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
