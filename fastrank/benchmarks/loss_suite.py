"""The loss suite: hidden rows and head in, loss and their gradients out.

Labels are made likely in the hidden rows, by an amount that differs from candidate to candidate:
like a model's own tokens they run from improbable to nearly certain, and the scores lie far enough
apart that no dtype's rounding decides a ranking.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

import fastrank

from . import plain, published
from .problem import Floor, Outputs, Problem, Variant, rewards_with_accuracy
from .workloads import Workload

# Labels' logits reach from this to that multiple of the logits' log-sum-exp.
_WEAKEST, _STRONGEST = 0.4, 1.1


class LossProblem(Problem):
    """Inputs of the loss suite: ``hidden`` [T, D], ``weight`` [V, D] (both require gradients,
    unless the head is frozen), ``labels`` [T], ``rewards`` [G, n], host offsets."""

    def __init__(self, workload: Workload, device: torch.device) -> None:
        super().__init__(workload, device)
        w = workload
        host = torch.Generator().manual_seed(w.seed)
        place = torch.Generator(device).manual_seed(w.seed)
        self.shape = (w.groups, w.candidates, w.response)
        order = torch.rand(w.groups, w.candidates, generator=host).argsort(dim=1)
        self.rewards = rewards_with_accuracy(order.float(), w.accuracy, host).to(device)
        self.labels = torch.randint(w.vocab, (w.tokens,), generator=place, device=device)
        weight = torch.randn(w.vocab, w.hidden, generator=place, device=device)
        weight /= math.sqrt(w.hidden)
        hidden = torch.randn(w.tokens, w.hidden, generator=place, device=device)
        steps = order.to(device).float() / max(1, w.candidates - 1)
        strength = (math.log(w.vocab) + 0.5) * (_WEAKEST + (_STRONGEST - _WEAKEST) * steps)
        per_token = strength.reshape(-1).repeat_interleave(w.response)
        for rows in torch.arange(w.tokens, device=device).split(1024):
            hidden[rows] += per_token[rows, None] * weight[self.labels[rows]]
        self.hidden = hidden.to(self.dtype).requires_grad_()
        self.weight = weight.to(self.dtype).requires_grad_(not w.frozen_head)
        responses = torch.arange(w.groups * w.candidates + 1, dtype=torch.int32) * w.response
        self.cu_responses = responses
        self.cu_groups = torch.arange(w.groups + 1, dtype=torch.int32) * w.candidates
        self.loss = fastrank.loss_from_name(w.loss)

    def variants(self) -> list[Variant]:
        from .loss_peers import VARIANTS

        return [v for v in VARIANTS if v.target in ("loss", f"published {self.workload.loss}")]

    @property
    def inputs(self) -> list[Tensor]:
        """What is differentiated."""
        return [self.hidden] if self.workload.frozen_head else [self.hidden, self.weight]

    def gradients(self, loss: Tensor) -> Outputs:
        """The results of a run: the loss and its gradients."""
        grads = torch.autograd.grad(loss, self.inputs)
        return {"loss": loss.detach(), **dict(zip(("dhidden", "dweight"), grads, strict=False))}

    def padded_labels(self, group: int) -> Tensor:
        """A group's labels [n, L] as the published loops have them: one a row of hidden, -100 for
        the prompt's rows and for the last."""
        _, n, length = self.shape
        labels = torch.full((n, self.workload.prompt + length), published.IGNORED)
        labels = labels.to(self.device)
        first = self.workload.prompt - 1
        tokens = slice(group * n * length, (group + 1) * n * length)
        labels[:, first : first + length] = self.labels[tokens].view(n, length)
        return labels

    def padded_hidden(self) -> Tensor:
        """[C, P + R, D]: the response rows where a model would have them, any values elsewhere
        (they are projected, but no label looks at them)."""
        candidates = self.shape[0] * self.shape[1]
        length = self.workload.prompt + self.workload.response
        out = torch.ones(
            candidates, length, self.workload.hidden, dtype=self.dtype, device=self.device
        )
        first = self.workload.prompt - 1
        rows = self.hidden.detach().view(candidates, self.workload.response, -1)
        out[:, first : first + self.workload.response] = rows
        return out

    def compute_reference(self, target: str) -> Outputs:
        """Group by group in float64, by autograd through plain operations."""
        groups, n, length = self.shape
        wanted = not self.workload.frozen_head
        weight = self.weight.detach().double().requires_grad_(wanted)
        padded = None if target == "loss" else self.padded_hidden()
        total, hidden_grads = torch.zeros((), dtype=torch.float64, device=self.device), []
        for group in range(groups):
            rewards = self.rewards[group].double()
            if padded is None:
                tokens = slice(group * n * length, (group + 1) * n * length)
                hidden = self.hidden[tokens].detach().double().requires_grad_()
                logp = torch.log_softmax(hidden @ weight.t(), dim=-1)
                logp = logp.gather(1, self.labels[tokens, None]).view(1, n, length)
                loss = plain.loss_from_logprobs(logp, rewards[None], self.workload.loss)
            else:
                labels = self.padded_labels(group)
                hidden = padded[group * n : (group + 1) * n].double().requires_grad_()
                loss = published_loss(self.workload.loss, hidden, weight, labels, rewards)
            (loss / groups).backward()
            total += loss.detach() / groups
            assert hidden.grad is not None
            hidden_grads.append(hidden.grad)
        reference = {"loss": total, "dhidden": torch.cat(hidden_grads)}
        if weight.grad is not None:
            reference["dweight"] = weight.grad
        return reference

    def product_flops(self) -> int:
        w = self.workload
        return 2 * w.tokens * w.vocab * w.hidden

    def floor(self) -> Floor:
        """The vendor's products in the three layouts that are needed (two for a frozen head), in
        the workload's dtype; besides, the logits read once for the statistics, read and written
        once for the gradient."""
        w = self.workload
        hidden, weight = self.hidden.detach(), self.weight.detach()
        logits = torch.empty(w.tokens, w.vocab, dtype=self.dtype, device=self.device)
        logits.normal_(generator=torch.Generator(self.device).manual_seed(1))
        hidden_grad, weight_grad = torch.empty_like(hidden), torch.empty_like(weight)

        def products() -> None:
            torch.mm(logits, weight, out=hidden_grad)
            if not w.frozen_head:
                torch.mm(logits.t(), hidden, out=weight_grad)
            torch.mm(hidden, weight.t(), out=logits)

        count = 2 if w.frozen_head else 3
        wide = 4 if self.device.type == "cuda" else self.dtype.itemsize
        traffic = w.tokens * w.vocab * (2 * wide + self.dtype.itemsize)
        return Floor(f"floor: {count} products", products, traffic)


def published_loss(
    loss: str, hidden: Tensor, weight: Tensor, labels: Tensor, rewards: Tensor
) -> Tensor:
    """One prompt by the published formula; ``hidden`` [n, L, D]."""
    if loss == "rrhf":
        return published.rrhf_from_logits(hidden @ weight.t(), labels, rewards)
    order = rewards.argsort(descending=True)
    forwards = [partial(_logits, hidden[i : i + 1], weight) for i in order.tolist()]
    return published.pro_from_forwards(forwards, labels[order], rewards[order])


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    return hidden @ weight.t()
