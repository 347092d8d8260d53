"""All variants of the loss suite, each behind the same call.

Peers stop at token log-probabilities and go on with `loss_from_logprobs`. They are called as their
own documentation does, with their defaults, from their published packages, imported when they are
first used.
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

from .loss_formulas import label_logprobs, loss_from_logprobs
from .loss_suite import LossProblem
from .problem import Outputs, Step, Variant

Logprobs = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden [T, D], weight [V, D], labels [T]) -> token log-probabilities [T]."""


def _make_from_logprobs(problem: LossProblem, find: Callable[[], Logprobs]) -> Step:
    token_logprobs = find()

    def step() -> Outputs:
        logprobs = token_logprobs(problem.hidden, problem.weight, problem.labels)
        shaped = logprobs.view(problem.shape)
        return problem.gradients(loss_from_logprobs(shaped, problem.rewards, problem.workload.loss))

    return step


def _make_fused(problem: LossProblem) -> Step:
    def step() -> Outputs:
        out = fastrank.linear_ranking_loss(
            problem.hidden,
            problem.weight,
            problem.labels,
            problem.rewards.view(-1),
            cu_responses=problem.cu_responses,
            cu_groups=problem.cu_groups,
            loss=problem.loss,
        )
        return problem.gradients(out.loss)

    return step


def _make_every_row(problem: LossProblem) -> Step:
    """The fused operator with the rows of dead candidates kept, to show the gain of dropping."""

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
        return loss_from_logprobs(logprobs, rewards, loss)

    compiled = torch.compile(forward, dynamic=False)
    inputs = (problem.hidden, problem.weight, problem.labels, problem.rewards)
    return lambda: problem.gradients(compiled(*inputs))


def _plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return label_logprobs(F.linear(hidden, weight), labels)


def _torch(**options: Any) -> Logprobs:
    return lambda h, w, y: -F.linear_cross_entropy(h, w, y, reduction="none", **options)


def _torch_chunked() -> Logprobs:
    return _torch(options=torch.nn.LinearCrossEntropyOptions())


def _liger_fused() -> Logprobs:
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction as Function

    options = (None, None, -100, 0.0, 0.0, "none")
    return lambda h, w, y: -Function.apply(h, w, y, *options)[0]


def _liger_scaled() -> Logprobs:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Function

    return lambda h, w, y: -Function.apply(h, w, y)


def _liger_scaled_generic() -> Logprobs:
    # The fallback of the function above on other GPUs, asked for on a Hopper GPU too.
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
    """The paper's loop over the padded rows of one prompt at a time, gradients accumulated."""
    hidden, labels = problem.padded()
    return lambda: problem.group_by_group(hidden, labels, published=True)


def _needs(*packages: str, cuda: bool = False) -> Callable[[LossProblem], str | None]:
    """Give the reason if a package or a CUDA device is missing, as `Variant.missing` wants it."""

    def missing(problem: LossProblem) -> str | None:
        if cuda and problem.device.type != "cuda":
            return "needs CUDA"
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
    reason = _needs("liger_kernel", cuda=True)(problem)
    if reason is None and torch.cuda.get_device_capability(problem.device) != (9, 0):
        return "needs a Hopper GPU"
    if reason is None and find_spec("cutlass") is None:
        return "package nvidia-cutlass-dsl is not installed"
    return reason


def _peer(name: str, find: Callable[[], Logprobs], missing: Callable[[Any], str | None]) -> Variant:
    return Variant(name, partial(_make_from_logprobs, find=find), missing=missing)


PROBLEM = LossProblem

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
    _peer("F.linear_cross_entropy, whole logits", _torch, _needs_torch_function),
    _peer("TRL ChunkedLogProb", _trl, _needs("trl")),
    _peer("liger scaled CE, generic", _liger_scaled_generic, _needs("liger_kernel")),
    _peer("liger scaled CE, Hopper", _liger_scaled, _needs_hopper),
    _peer("liger fused CE", _liger_fused, _needs("liger_kernel", cuda=True)),
    Variant("published loop", _make_published, target="published"),
    # Last, because they tune or compile for longest: a run with a deadline loses these.
    _peer("cut-cross-entropy", _cut, _needs("cut_cross_entropy", cuda=True)),
    _peer(
        "cut-cross-entropy, no filter",
        partial(_cut, filter_eps=None),
        _needs("cut_cross_entropy", cuda=True),
    ),
    _peer(
        "cut-cross-entropy, torch_compile",
        partial(_cut, impl="torch_compile"),
        _needs("cut_cross_entropy"),
    ),
]
HOLDS_ALL_LOGITS = (
    "plain PyTorch",
    "torch.compile of plain",
    "F.linear_cross_entropy, whole logits",
    "cut-cross-entropy, torch_compile",
    "published loop",
)
"""Peers for which the logits of all tokens (of one prompt, for the loop) exist at once."""
