"""Everyone who can do the loss suite, each behind the same call.

Peers stop at token log-probabilities; what follows them is `plain.loss_from_logprobs` for all. They
are called as their own documentation does, with their defaults, from their published packages,
imported when they are first used.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastrank
import fastrank_kernels

from . import plain
from .loss_suite import LossProblem, published_loss
from .problem import Outputs, Step, Variant

Logprobs = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden [T, D], weight [V, D], labels [T]) -> token log-probabilities [T]."""


def _make_from_logprobs(problem: LossProblem, find: Callable[[], Logprobs]) -> Step:
    logprobs = find()

    def step() -> Outputs:
        per_token = logprobs(problem.hidden, problem.weight, problem.labels)
        loss = plain.loss_from_logprobs(
            per_token.view(problem.shape), problem.rewards, problem.workload.loss
        )
        return problem.gradients(loss)

    return step


def _make_fused(problem: LossProblem, **options: Any) -> Step:
    def step() -> Outputs:
        out = fastrank.linear_ranking_loss(
            problem.hidden,
            problem.weight,
            problem.labels,
            problem.rewards.view(-1),
            cu_responses=problem.cu_responses,
            cu_groups=problem.cu_groups,
            loss=problem.loss,
            **options,
        )
        return problem.gradients(out.loss)

    return step


def _make_every_row(problem: LossProblem) -> Step:
    """The fused operator without dropping rows of dead candidates: what dropping is worth."""

    def step() -> Outputs:
        loss, *_ = fastrank_kernels.linear_ranking(
            fastrank_kernels.Projection(problem.hidden, problem.weight, problem.labels),
            problem.rewards.view(-1),
            cu_responses=problem.cu_responses,
            cu_groups=problem.cu_groups,
            spec=problem.loss.spec(),
            scale=1.0 / problem.workload.groups,
            drop_dead_rows=False,
        )
        return problem.gradients(loss)

    return step


def _make_compiled(problem: LossProblem) -> Step:
    shape, loss = problem.shape, problem.workload.loss

    def forward(hidden: Tensor, weight: Tensor, labels: Tensor, rewards: Tensor) -> Tensor:
        logprobs = _plain(hidden, weight, labels).view(shape)
        return plain.loss_from_logprobs(logprobs, rewards, loss)

    compiled = torch.compile(forward, dynamic=False)
    inputs = (problem.hidden, problem.weight, problem.labels, problem.rewards)
    return lambda: problem.gradients(compiled(*inputs))


def _plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(hidden, weight)
    logprobs = F.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    return logprobs.gather(1, labels[:, None]).squeeze(1)


def _torch_chunked() -> Logprobs:
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda h, w, y: -F.linear_cross_entropy(h, w, y, reduction="none", options=options)


def _torch_whole() -> Logprobs:
    return lambda h, w, y: -F.linear_cross_entropy(h, w, y, reduction="none")


def _liger_fused() -> Logprobs:
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction as Function

    def logprobs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        nll = Function.apply(hidden, weight, labels, None, None, -100, 0.0, 0.0, "none")[0]
        return -nll

    return logprobs


def _liger_scaled() -> Logprobs:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Function

    return lambda h, w, y: -Function.apply(h, w, y)


def _liger_scaled_generic() -> Logprobs:
    # What the line above falls back to away from Hopper, asked for on a Hopper GPU too.
    from liger_kernel.ops import fused_linear_scaled_cross_entropy as module

    generic = module._FusedLinearPPOFallbackFunction
    return lambda h, w, y: -generic.apply(h, w, y, 1.0, -100, False)


def _cut(**options: Any) -> Logprobs:
    from cut_cross_entropy import linear_cross_entropy

    return lambda h, w, y: -linear_cross_entropy(h, w, y, reduction="none", **options)


def _trl() -> Logprobs:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as chunk

    return lambda h, w, y: ChunkedLogProbFunction.apply(h, w, None, y, 1.0, chunk, None, 1.0, ())[0]


def _make_published(problem: LossProblem) -> Step:
    """The paper's loop over the padded rows of one prompt a time, gradients accumulated."""
    groups, n, _ = problem.shape
    padded = problem.padded_hidden()
    labels = [problem.padded_labels(group) for group in range(groups)]
    trainable = problem.weight.requires_grad

    def step() -> Outputs:
        weight = problem.weight.detach().requires_grad_(trainable)
        losses, hidden_grads = [], []
        for group in range(groups):
            hidden = padded[group * n : (group + 1) * n].detach().requires_grad_()
            loss = published_loss(
                problem.workload.loss, hidden, weight, labels[group], problem.rewards[group]
            )
            (loss / groups).backward()
            losses.append(loss.detach() / groups)
            assert hidden.grad is not None
            hidden_grads.append(hidden.grad)
        results = {"loss": torch.stack(losses).sum(), "dhidden": torch.cat(hidden_grads)}
        if weight.grad is not None:
            results["dweight"] = weight.grad
        return results

    return step


def needs(*packages: str, device: str | None = None) -> Callable[[Any], str | None]:
    """The reason why packages or a device are missing, as `Variant.missing` wants it."""

    def missing(problem: Any) -> str | None:
        if device is not None and problem.device.type != device:
            return f"needs {device.upper() if device == 'cpu' else 'CUDA'}"
        for package in packages:
            if find_spec(package) is None:
                return f"package {package.replace('_', '-')} is not installed"
        return None

    return missing


def _needs_torch_function(problem: LossProblem) -> str | None:
    return None if hasattr(F, "linear_cross_entropy") else "torch before 2.13 has none"


def _needs_dead_rows(problem: LossProblem) -> str | None:
    if problem.workload.accuracy and problem.workload.loss == "rrhf":
        return None
    return "no row is dead here (RRHF with --accuracy leaves some)"


def _needs_hopper(problem: LossProblem) -> str | None:
    reason = needs("liger_kernel", device="cuda")(problem)
    if reason is None and torch.cuda.get_device_capability(problem.device) != (9, 0):
        return "needs a Hopper GPU"
    if reason is None and find_spec("cutlass") is None:
        return "package nvidia-cutlass-dsl is not installed"
    return reason


def _peer(name: str, find: Callable[[], Logprobs], missing: Callable[[Any], str | None]) -> Variant:
    return Variant(name, partial(_make_from_logprobs, find=find), missing=missing)


VARIANTS = [
    Variant("fastrank", _make_fused, ours=True),
    Variant("fastrank, every row", _make_every_row, ours=True, missing=_needs_dead_rows),
    Variant(
        "fastrank.token_logprobs",
        partial(_make_from_logprobs, find=lambda: fastrank.token_logprobs),
        ours=True,
    ),
    _peer("plain PyTorch", lambda: _plain, lambda problem: None),
    Variant("torch.compile of plain", _make_compiled),
    _peer("F.linear_cross_entropy", _torch_chunked, _needs_torch_function),
    _peer("F.linear_cross_entropy, whole logits", _torch_whole, _needs_torch_function),
    _peer("TRL ChunkedLogProb", _trl, needs("trl")),
    _peer("liger scaled CE, generic", _liger_scaled_generic, needs("liger_kernel")),
    _peer("liger scaled CE, Hopper", _liger_scaled, _needs_hopper),
    _peer("liger fused CE", _liger_fused, needs("liger_kernel", device="cuda")),
    Variant("published loop", _make_published, target="published rrhf"),
    Variant("published loop", _make_published, target="published pro"),
    # Last, because they tune or compile for longest: a run with a deadline loses these.
    _peer("cut-cross-entropy", _cut, needs("cut_cross_entropy", device="cuda")),
    _peer(
        "cut-cross-entropy, no filter",
        partial(_cut, filter_eps=None),
        needs("cut_cross_entropy", device="cuda"),
    ),
    _peer(
        "cut-cross-entropy, torch_compile",
        partial(_cut, impl="torch_compile"),
        needs("cut_cross_entropy"),
    ),
]
"""fastrank first. The published loops compute another function and have references of their own."""

HOLDS_ALL_LOGITS = (
    "plain PyTorch",
    "torch.compile of plain",
    "F.linear_cross_entropy, whole logits",
    "cut-cross-entropy, torch_compile",
    "published loop",
)
"""Peers for which the logits of all tokens (of one prompt, for the loop) exist at once."""
