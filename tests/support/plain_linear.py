"""A plain computation of the whole fused loss: full logits, log_softmax, Python loops over
groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from error_budget import ROUNDINGS, UNIT, shifts
from torch import Tensor

import fastrank
from fastrank.losses import PRO, Loss
from fastrank_kernels import Projection


@dataclass
class Problem:
    """Ragged groups over a small vocabulary, with rows that repeat, ties, and one-token
    responses."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    rows: Tensor | None
    rewards: Tensor
    cu_responses: Tensor
    cu_groups: Tensor
    reference_scores: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0

    def to(self, dtype: torch.dtype) -> Problem:
        """The same numbers in another dtype, as fresh leaves."""

        def cast(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.detach().to(dtype).requires_grad_(x.requires_grad)

        return replace(
            self, hidden=cast(self.hidden), weight=cast(self.weight), bias=cast(self.bias)
        )

    def on(self, device: torch.device | str, dtype: torch.dtype) -> Problem:
        """The same, cast, with everything but the offsets on a device and float32 rewards."""
        moved = self.to(dtype)
        for name in ("hidden", "weight", "bias", "labels", "rows", "rewards", "reference_scores"):
            tensor = getattr(moved, name)
            if tensor is not None:
                if name in ("rewards", "reference_scores"):
                    tensor = tensor.float()
                tensor = tensor.detach().to(device).requires_grad_(tensor.requires_grad)
                setattr(moved, name, tensor)
        return moved

    def exact(self, loss: Loss, upstream: float | Tensor = 1.0) -> list[Tensor]:
        """The mean loss and its gradients, from the same rounded inputs in float64."""
        wide = self.to(torch.float64)
        if self.reference_scores is not None:
            wide.reference_scores = self.reference_scores.double()
        total = wide.plain(loss).mean()
        return [total, *torch.autograd.grad(total * upstream, wide.leaves())]

    def value_and_gradients(
        self, loss: Loss, upstream: float | Tensor = 1.0, **options
    ) -> list[Tensor]:
        """The fused mean loss, and its gradients under an upstream factor."""
        total = self.fused(loss, **options).loss
        return [total, *torch.autograd.grad(total * upstream, self.leaves())]

    def float32_error(self, exact: Callable[[Problem], list[Tensor]]) -> float:
        """How far, by `largest_error`, a float32 computation may be from what ``exact`` makes of a
        float64 problem: four times what roundings of hidden rows and head come to, and the
        result's own."""

        def compute(cast: Callable[[Tensor], Tensor]) -> list[Tensor]:
            case = self.to(torch.float64)
            for name in ("hidden", "weight", "bias"):
                if (tensor := getattr(case, name)) is not None:
                    moved = cast(tensor).requires_grad_(tensor.requires_grad)
                    setattr(case, name, moved)
            return exact(case)

        units = ROUNDINGS if self.softcap is None else 2 * ROUNDINGS
        results = zip(shifts(compute, units), compute(torch.Tensor.double), strict=True)
        most = max(float(shift.max() / x.abs().max().clamp_min(1.0)) for shift, x in results)
        return 4 * most + UNIT

    def make_confident(self) -> None:
        """p(label) > 0.99: the label's head row points along the hidden row."""
        with torch.no_grad():
            h = (self.hidden if self.rows is None else self.hidden[self.rows]).float()
            lifted = self.weight.float()
            lifted[self.labels] += 8 * h / h.norm(dim=1, keepdim=True)
            self.weight.copy_(lifted)

    def leaves(self) -> list[Tensor]:
        return [
            x for x in (self.hidden, self.weight, self.bias) if x is not None and x.requires_grad
        ]

    def head(self) -> dict:
        return {
            "rows": self.rows,
            "bias": self.bias,
            "softcap": self.softcap,
            "logit_scale": self.logit_scale,
        }

    def projection(self, **options) -> Projection:
        """The call of the operators."""
        return Projection(self.hidden, self.weight, self.labels, **self.head(), **options)

    def groups(self) -> dict:
        """The keyword arguments that say how the tokens make candidates and groups."""
        return {
            "rewards": self.rewards,
            "cu_responses": self.cu_responses,
            "cu_groups": self.cu_groups,
        }

    def fused(self, loss: Loss, **options) -> fastrank.RankingOutput:
        reference = self.reference_scores if loss.uses_reference else None
        return fastrank.linear_ranking_loss(
            self.hidden,
            self.weight,
            self.labels,
            self.rewards,
            cu_responses=self.cu_responses,
            cu_groups=self.cu_groups,
            loss=loss,
            reference_scores=reference,
            **self.head(),
            **options,
        )

    def logprobs(self) -> Tensor:
        """Token log-probabilities by plain PyTorch in the tensors' own dtype, upcast before the
        softmax as a careful user does."""
        hidden = self.hidden if self.rows is None else self.hidden[self.rows]
        z = hidden @ self.weight.t()
        z = z if z.dtype == torch.float64 else z.float()
        if self.bias is not None:
            z = z + self.bias.to(z.dtype)
        z = z * self.logit_scale
        if self.softcap is not None:
            z = self.softcap * torch.tanh(z / self.softcap)
        return torch.log_softmax(z, -1).gather(1, self.labels[:, None]).squeeze(1)

    def plain(self, loss: Loss) -> Tensor:
        """[G] loss of each group, differentiable."""
        logp = self.logprobs()
        bounds, groups = self.cu_responses.tolist(), self.cu_groups.tolist()
        per_group = []
        for first, last in zip(groups, groups[1:], strict=False):
            tokens = [logp[bounds[i] : bounds[i + 1]] for i in range(first, last)]
            if not tokens:
                per_group.append(logp.sum() * 0)
                continue
            exponent = {"mean": 1.0, "sum": 0.0}.get(loss.normalize, loss.normalize)
            scores = torch.stack([t.sum() / len(t) ** exponent for t in tokens])
            if loss.uses_reference and self.reference_scores is not None:
                scores = scores - self.reference_scores[first:last]
            rewards = self.rewards[first:last].to(scores.dtype)
            term = fastrank.ranking_loss(scores, rewards, loss=loss)
            best = tokens[max(range(len(tokens)), key=lambda i: (rewards[i].item(), -i))]
            weight = loss.sft_weight * ((len(tokens) - 1) ** 2 if isinstance(loss, PRO) else 1)
            sft = best.mean() if loss.sft_reduction == "mean" else best.sum()
            per_group.append(term - weight * sft)
        return torch.stack(per_group)


def make_problem(
    seed: int = 0,
    *,
    vocab: int = 97,
    width: int = 24,
    groups: tuple[int, ...] = (4, 1, 0, 3, 2),
    longest: int = 7,
    repeat_rows: bool = True,
    bias: bool = True,
    softcap: float | None = 5.0,
    logit_scale: float = 0.7,
    frozen_head: bool = False,
) -> Problem:
    """A float64 problem; cast it with `Problem.to`."""
    g = torch.Generator().manual_seed(seed)
    candidates = sum(groups)
    lengths = torch.randint(1, longest + 1, (candidates,), generator=g)
    tokens = int(lengths.sum())
    zero = torch.zeros(1, dtype=torch.int32)
    num_hidden = tokens // 2 + 3 if repeat_rows else tokens
    return Problem(
        hidden=torch.randn(num_hidden, width, dtype=torch.float64, generator=g).requires_grad_(),
        weight=(torch.randn(vocab, width, dtype=torch.float64, generator=g) * 0.4).requires_grad_(
            not frozen_head
        ),
        bias=torch.randn(vocab, dtype=torch.float64, generator=g).requires_grad_(not frozen_head)
        if bias
        else None,
        labels=torch.randint(0, vocab, (tokens,), generator=g),
        rows=torch.randint(0, num_hidden, (tokens,), generator=g) if repeat_rows else None,
        rewards=torch.randint(0, 3, (candidates,), generator=g).double() / 2,
        cu_responses=torch.cat([zero, lengths.cumsum(0).int()]),
        cu_groups=torch.cat([zero, torch.tensor(groups).cumsum(0).int()]),
        reference_scores=torch.randn(candidates, dtype=torch.float64, generator=g),
        softcap=softcap,
        logit_scale=logit_scale,
    )


def largest_error(got: list[Tensor], want: list[Tensor]) -> float:
    """Largest absolute difference, in units of the largest wanted entry (at least 1)."""
    return max(
        (a.double() - b.double()).abs().max().item() / max(1.0, b.abs().max().item())
        for a, b in zip(got, want, strict=True)
    )


class ErrorComparison:
    """Relative errors of our gradients and of plain PyTorch's in the same narrow dtype."""

    def __init__(self) -> None:
        self.ours: list[list[float]] = []
        self.plain: list[list[float]] = []

    def add(self, ours: Sequence[Tensor], plain: Sequence[Tensor], exact: Sequence[Tensor]) -> None:
        for grads, errors in ((ours, self.ours), (plain, self.plain)):
            pairs = zip(grads, exact, strict=True)
            errors.append([((a.double() - b).norm() / b.norm()).item() for a, b in pairs])

    def check(self) -> None:
        """Two roundings of the same size differ by chance: means over the cases, and 5 % more."""
        ours, plain = torch.tensor(self.ours).mean(0), torch.tensor(self.plain).mean(0)
        assert (ours <= 1.05 * plain).all(), (ours, plain)
