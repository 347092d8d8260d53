"""The loss suite: hidden rows and head in, loss and their gradients out.

Labels are made likely in the hidden rows, by an amount that differs from candidate to candidate:
like a model's own tokens they run from improbable to nearly certain, and the scores lie far enough
apart that no dtype's rounding decides a ranking.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastrank

from .loss_formulas import IGNORED, label_logprobs, loss_from_logprobs, published_loss
from .problem import Floor, Outputs, Problem, Target, rewards_with_accuracy
from .workloads import Workload

# Labels' logits reach from this to that multiple of the logits' log-sum-exp.
_WEAKEST, _STRONGEST = 0.4, 1.1


class LossProblem(Problem):
    """Inputs of the loss suite: ``hidden`` [T, D], ``weight`` [V, D] and possibly ``bias`` [V] (all
    require gradients, unless the head is frozen), ``labels`` [T], ``rewards`` [G, n], host
    offsets."""

    def __init__(self, workload: Workload, device: torch.device) -> None:
        super().__init__(workload, device)
        w = workload
        host = torch.Generator().manual_seed(w.seed)
        place = torch.Generator(device).manual_seed(w.seed)
        self.shape = (w.groups, w.candidates, w.response)
        self.product_flops = 2 * w.tokens * w.vocab * w.hidden
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
        head_dtype = torch.float32 if w.autocast else self.dtype
        # Representable in the workload's dtype, so that rounding the head is no error of anybody's.
        weight = weight.to(self.dtype).to(head_dtype)
        self.weight = weight.requires_grad_(not w.frozen_head)
        self.bias: Tensor | None = None
        if w.softcap:
            bias = torch.randn(w.vocab, generator=place, device=device).to(self.dtype)
            self.bias = bias.to(head_dtype).requires_grad_(not w.frozen_head)
        responses = torch.arange(w.groups * w.candidates + 1, dtype=torch.int32) * w.response
        self.cu_responses = responses
        self.cu_groups = torch.arange(w.groups + 1, dtype=torch.int32) * w.candidates
        self.loss = fastrank.loss_from_name(w.loss)

    @property
    def inputs(self) -> list[Tensor]:
        """The differentiated inputs."""
        given = (self.hidden, self.weight, self.bias)
        return [x for x in given if x is not None and x.requires_grad]

    @property
    def softcap(self) -> float | None:
        return self.workload.softcap or None

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of the forward pass."""
        if not self.workload.autocast:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The logits by plain operations."""
        logits = F.linear(hidden, weight, bias)
        cap = self.softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def gradients(self, loss: Tensor, hidden: Tensor | None = None) -> Outputs:
        """The results of a run: the loss and its gradients; ``hidden`` if it stands for the
        problem's own."""
        inputs = self.inputs if hidden is None else [hidden, *self.inputs[1:]]
        grads = torch.autograd.grad(loss, inputs)
        names = ("dhidden", "dweight", "dbias")
        return {"loss": loss.detach(), **dict(zip(names, grads, strict=False))}

    def padded(self) -> tuple[Tensor, Tensor]:
        """Hidden rows [C, P + R, D] and labels [C, P + R] as the published loops have them.

        The response's rows stand where a model would have them, any values elsewhere: those are
        projected, but no label looks at them. Labels are shifted, -100 for the prompt's rows and
        for the last.
        """
        w = self.workload
        rows = slice(w.prompt - 1, w.prompt - 1 + w.response)
        size = (w.groups * w.candidates, w.prompt + w.response)
        hidden = torch.ones(*size, w.hidden, dtype=self.dtype, device=self.device)
        hidden[:, rows] = self.hidden.detach().view(-1, w.response, w.hidden)
        labels = torch.full(size, IGNORED, device=self.device)
        labels[:, rows] = self.labels.view(-1, w.response)
        return hidden, labels

    def compute_reference(self, target: Target) -> Outputs:
        if target == "published":
            hidden, labels = self.padded()
            return self.group_by_group(hidden.double(), labels, published=True)
        return self.group_by_group(self.hidden.detach().double(), self.labels)

    def group_by_group(self, hidden: Tensor, labels: Tensor, published: bool = False) -> Outputs:
        """The results by plain operations, in the dtype of ``hidden``: a forward and backward pass
        per group, gradients accumulated. The inputs are as `padded` gives them, or without padding
        [T, D] and [T]."""
        groups, n, length = self.shape
        weight, bias = (
            None if x is None else x.detach().to(hidden.dtype).requires_grad_(x.requires_grad)
            for x in (self.weight, self.bias)
        )
        assert weight is not None
        rewards = self.rewards.to(torch.promote_types(hidden.dtype, torch.float32))
        losses, hidden_grads = [], []
        for group in range(groups):
            rows = hidden.chunk(groups)[group].detach().requires_grad_()
            targets = labels.chunk(groups)[group]
            if published:
                loss = published_loss(
                    lambda x: self.logits(x, weight, bias), rows, targets, rewards[group],
                    self.workload.loss,
                )  # fmt: skip
            else:
                logits = self.logits(rows, weight, bias)
                logprobs = label_logprobs(logits, targets).view(1, n, length)
                loss = loss_from_logprobs(logprobs, rewards[None, group], self.workload.loss)
            (loss / groups).backward()
            losses.append(loss.detach() / groups)
            assert rows.grad is not None
            hidden_grads.append(rows.grad)
        results = {"loss": torch.stack(losses).sum(), "dhidden": torch.cat(hidden_grads)}
        for name, parameter in (("dweight", weight), ("dbias", bias)):
            if parameter is not None and parameter.grad is not None:
                results[name] = parameter.grad
        return results

    def floor(self) -> Floor:
        """The vendor's products in the three layouts that are needed (two for a frozen head), in
        the workload's dtype; besides, the logits read once for the statistics, read and written
        once for the gradient."""
        w = self.workload
        hidden, weight = self.hidden.detach(), self.weight.detach().to(self.dtype)
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
