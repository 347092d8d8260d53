"""The rank suite: scores and rewards in, ranking term and score gradients out.

The work is tiny; the kernels, allocations and Python steps around it decide the time. The published
scripts loop over prompts (they hold one per batch); on scores alone their ranking terms are the
same function as fastrank's, so all are held against one reference. `response` tokens per candidate
matter to `fastrank_kernels.rank_tokens` alone, which begins at the tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastrank
import fastrank_kernels

from .loss_formulas import published_pro_term, published_rrhf_term, ranking_term
from .problem import Outputs, Problem, Step, Target, Variant, rewards_with_accuracy
from .workloads import Workload

_GRAPH_LAUNCHES = 20


class RankProblem(Problem):
    """``scores`` [G, n], which require gradients, and ``rewards`` [G, n] falling in each group (the
    order in which PRO's script expects its candidates)."""

    inner = 10
    has_memory = False

    def __init__(self, workload: Workload, device: torch.device) -> None:
        super().__init__(workload, device)
        w = workload
        host = torch.Generator().manual_seed(w.seed)
        order = torch.rand(w.groups, w.candidates, generator=host).argsort(dim=1).float()
        rewards = rewards_with_accuracy(order, w.accuracy, host)
        falling = rewards.argsort(dim=1, descending=True)
        # Like mean log-probabilities: around -2, far enough apart for any dtype.
        jitter = 0.2 * torch.rand(order.shape, generator=host)
        scores = -0.5 - 3.0 * (order + jitter) / w.candidates
        self.scores = scores.gather(1, falling).to(device, self.dtype).requires_grad_()
        self.rewards = (rewards.gather(1, falling) / w.candidates).to(device)
        self.loss = fastrank.loss_from_name(w.loss)

    def gradients(self, loss: Tensor) -> Outputs:
        """The results of a run: the loss, mean over groups, and its gradient."""
        (grad,) = torch.autograd.grad(loss, self.scores)
        return {"loss": loss.detach(), "dscores": grad}

    def compute_reference(self, target: Target) -> Outputs:
        scores = self.scores.detach().double().requires_grad_()
        loss = ranking_term(scores, self.rewards.double(), self.workload.loss).mean()
        (grad,) = torch.autograd.grad(loss, scores)
        return {"loss": loss.detach(), "dscores": grad}


def _make_fused(problem: RankProblem) -> Step:
    ranking_loss = partial(fastrank.ranking_loss, loss=problem.loss)
    return lambda: problem.gradients(ranking_loss(problem.scores, problem.rewards))


def _make_rank_tokens(problem: RankProblem) -> Step:
    """From token log-probabilities whose means are the scores, for callers with passes of their
    own: loss and coefficients by one call, nothing for autograd."""
    w = problem.workload
    logprobs = problem.scores.detach().reshape(-1).repeat_interleave(w.response)
    candidates = torch.arange(w.groups * w.candidates + 1, dtype=torch.int32)
    options: dict[str, Any] = {
        "cu_responses": candidates * w.response,
        "cu_groups": candidates[: w.groups + 1] * w.candidates,
        "spec": dataclasses.replace(problem.loss, sft_weight=0.0).spec(),
        "scale": 1.0 / w.groups,
    }

    def step() -> Outputs:
        found = fastrank_kernels.rank_tokens(logprobs, problem.rewards.reshape(-1), **options)
        return {"loss": found.rank_loss.mean(), "dscores": found.coefficients}

    return step


def _present_tokens(problem: RankProblem, outputs: Outputs) -> Outputs:
    grads = outputs["dscores"].view(*problem.scores.shape, -1).sum(-1)
    return {"loss": outputs["loss"], "dscores": grads}


def _make_graph(problem: RankProblem) -> Step:
    """The operator alone, value and gradient, in a captured graph: no host work at all."""
    w = problem.workload
    scores = problem.scores.detach().reshape(-1)
    rewards = problem.rewards.reshape(-1)
    cu_groups = torch.arange(w.groups + 1, dtype=torch.int32) * w.candidates
    cu_groups = cu_groups.to(problem.device)
    spec = problem.loss.spec().encode()

    def launch() -> tuple[Tensor, Tensor]:
        loss, grads = fastrank_kernels.ops.rank_scores(
            scores, rewards, cu_groups, None, spec=spec, backend="triton"
        )
        return loss, grads

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        launch()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_GRAPH_LAUNCHES):
            loss, grads = launch()

    def step() -> Outputs:
        graph.replay()
        return {"loss": loss, "dscores": grads}

    return step


def _present_graph(problem: RankProblem, outputs: Outputs) -> Outputs:
    groups = problem.workload.groups
    return {
        "loss": outputs["loss"].mean(),
        "dscores": outputs["dscores"].view(problem.scores.shape) / groups,
    }


def _make_plain(problem: RankProblem, compiled: bool = False) -> Step:
    term: Callable[..., Tensor] = partial(ranking_term, loss=problem.workload.loss)
    if compiled:
        term = torch.compile(term, dynamic=False, fullgraph=True)
    return lambda: problem.gradients(term(problem.scores, problem.rewards).mean())


def _make_published(problem: RankProblem) -> Step:
    term = {"rrhf": published_rrhf_term, "pro": published_pro_term}[problem.workload.loss]

    def step() -> Outputs:
        groups = zip(problem.scores, problem.rewards, strict=True)
        losses = [term(scores, rewards) for scores, rewards in groups]
        return problem.gradients(torch.stack(losses).mean())

    return step


PROBLEM = RankProblem

VARIANTS = [
    Variant("fastrank", _make_fused, ours=True),
    Variant("fastrank.rank_tokens", _make_rank_tokens, present=_present_tokens, ours=True),
    Variant(
        "fastrank kernel, replayed graph",
        _make_graph,
        present=_present_graph,
        ours=True,
        repeats=_GRAPH_LAUNCHES,
        missing=lambda problem: None if problem.device.type == "cuda" else "needs CUDA",
    ),
    Variant("plain PyTorch", _make_plain),
    Variant("torch.compile of plain", partial(_make_plain, compiled=True)),
    Variant("published loop", _make_published),
]
