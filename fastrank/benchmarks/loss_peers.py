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
    """Under autocast the head is cast by hand: a peer's own functions look at the dtypes given."""
    token_logprobs = find()
    return _from_logprobs(
        problem,
        lambda: token_logprobs(problem.hidden, problem.weight.to(problem.dtype), problem.labels),
    )


def _from_logprobs(problem: LossProblem, token_logprobs: Callable[[], Tensor]) -> Step:
    def step() -> Outputs:
        with problem.autocast():
            logprobs = token_logprobs().view(problem.shape)
            loss = loss_from_logprobs(logprobs, problem.rewards, problem.workload.loss)
        return problem.gradients(loss)

    return step


def _make_own_logprobs(problem: LossProblem) -> Step:
    inputs = (problem.hidden, problem.weight, problem.labels)
    head: dict[str, Any] = {"bias": problem.bias, "softcap": problem.softcap}
    return _from_logprobs(problem, lambda: fastrank.token_logprobs(*inputs, **head))


def _make_fused(problem: LossProblem, recompute: bool = False) -> Step:
    """With ``recompute`` no group's logits fit into the memory allowed: one more product."""
    w = problem.workload
    group_logits = w.candidates * w.response * w.vocab * problem.dtype.itemsize

    def step() -> Outputs:
        with problem.autocast():
            out = fastrank.linear_ranking_loss(
                problem.hidden,
                problem.weight,
                problem.labels,
                problem.rewards.view(-1),
                cu_responses=problem.cu_responses,
                cu_groups=problem.cu_groups,
                loss=problem.loss,
                bias=problem.bias,
                softcap=problem.softcap,
                logits_memory=group_logits // 2 if recompute else None,
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


def _make_plain(problem: LossProblem, compiled: bool = False) -> Step:
    shape, loss = problem.shape, problem.workload.loss

    def forward(hidden: Tensor, weight: Tensor, bias: Tensor | None, rewards: Tensor) -> Tensor:
        logits = problem.logits(hidden, weight, bias)
        return loss_from_logprobs(label_logprobs(logits, problem.labels).view(shape), rewards, loss)

    if compiled:
        forward = torch.compile(forward, dynamic=False)

    def step() -> Outputs:
        with problem.autocast():
            made = forward(problem.hidden, problem.weight, problem.bias, problem.rewards)
        return problem.gradients(made)

    return step


def _make_compiled_chunks(problem: LossProblem) -> Step:
    """The plain computation compiled for a fourth of the groups, each part back-propagated before
    the next is made: what PyTorch alone gives at a fourth of the logits' memory."""
    w = problem.workload
    parts = min(4, w.groups)

    def forward(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, rewards: Tensor
    ) -> Tensor:
        logprobs = label_logprobs(problem.logits(hidden, weight, bias), labels)
        shape = (rewards.shape[0], w.candidates, w.response)
        return loss_from_logprobs(logprobs.view(shape), rewards, w.loss)

    compiled = torch.compile(forward, dynamic=False)
    rows = torch.arange(w.tokens).view(w.groups, -1).tensor_split(parts)
    spans = [slice(int(part[0, 0]), int(part[-1, -1]) + 1) for part in rows]
    rewards = problem.rewards.tensor_split(parts)

    def step() -> Outputs:
        total: Outputs = {}
        hidden_grads = []
        for span, given in zip(spans, rewards, strict=True):
            hidden = problem.hidden[span].detach().requires_grad_()
            with problem.autocast():
                labels = problem.labels[span]
                loss = compiled(hidden, problem.weight, problem.bias, labels, given)
                loss = loss * (len(given) / w.groups)
            made = problem.gradients(loss, hidden)
            hidden_grads.append(made.pop("dhidden"))
            for name, value in made.items():
                total[name] = total[name].add_(value) if name in total else value
        return {**total, "dhidden": torch.cat(hidden_grads)}

    return step


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


def _quack() -> Logprobs:
    # Its chunked functions reduce to one number; only this one tells the tokens apart.
    from quack.linear_cross_entropy import linear_cross_entropy_func

    return lambda h, w, y: -linear_cross_entropy_func(h, w, None, y, reduction="none")


def _make_published(problem: LossProblem) -> Step:
    """The paper's loop over the padded rows of one prompt at a time, gradients accumulated."""
    hidden, labels = problem.padded()
    return lambda: problem.group_by_group(hidden, labels, published=True)


def _needs(*packages: str, cuda: bool = False) -> Callable[[LossProblem], str | None]:
    """Give the reason if a package or a CUDA device is missing, as `Variant.missing` wants it."""

    def missing(problem: LossProblem) -> str | None:
        if problem.bias is not None:
            return "called without a bias and softcap"
        if cuda and problem.device.type != "cuda":
            return "needs CUDA"
        for package in packages:
            if find_spec(package) is None:
                return f"package {package.replace('_', '-')} is not installed"
        return None

    return missing


def _needs_torch_function(problem: LossProblem) -> str | None:
    if not hasattr(F, "linear_cross_entropy"):
        return "torch before 2.13 has none"
    return _needs()(problem)


def _needs_plain_head(problem: LossProblem) -> str | None:
    w = problem.workload
    return "takes no autocast, bias or softcap" if w.autocast or w.softcap else None


def _needs_dead_rows(problem: LossProblem) -> str | None:
    if problem.workload.accuracy and problem.workload.loss == "rrhf":
        return _needs_plain_head(problem)
    return "no row is dead here (RRHF with --accuracy leaves some)"


def _needs_cutlass(package: str, hopper: bool = False) -> Callable[[LossProblem], str | None]:
    def missing(problem: LossProblem) -> str | None:
        reason = _needs(package, cuda=True)(problem)
        if reason is None and hopper:
            if torch.cuda.get_device_capability(problem.device) != (9, 0):
                return "needs a Hopper GPU"
        if reason is None and find_spec("cutlass") is None:
            return "package nvidia-cutlass-dsl is not installed"
        return reason

    return missing


def _peer(name: str, find: Callable[[], Logprobs], missing: Callable[[Any], str | None]) -> Variant:
    return Variant(name, partial(_make_from_logprobs, find=find), missing=missing)


PROBLEM = LossProblem

VARIANTS = [
    Variant("fastrank", _make_fused, ours=True),
    Variant("fastrank, every row", _make_every_row, ours=True, missing=_needs_dead_rows),
    Variant("fastrank, recompute", partial(_make_fused, recompute=True), ours=True),
    Variant("fastrank.token_logprobs", _make_own_logprobs, ours=True),
    Variant("plain PyTorch", _make_plain),
    Variant("torch.compile of plain", partial(_make_plain, compiled=True)),
    Variant("torch.compile of plain, 4 chunks", _make_compiled_chunks),
    _peer("F.linear_cross_entropy", _torch_chunked, _needs_torch_function),
    _peer("F.linear_cross_entropy, whole logits", _torch, _needs_torch_function),
    _peer("TRL ChunkedLogProb", _trl, _needs("trl")),
    _peer("liger scaled CE, generic", _liger_scaled_generic, _needs("liger_kernel")),
    _peer("liger scaled CE, Hopper", _liger_scaled, _needs_cutlass("liger_kernel", hopper=True)),
    _peer("liger fused CE", _liger_fused, _needs("liger_kernel", cuda=True)),
    _peer("QuACK CE, whole logits", _quack, _needs_cutlass("quack")),
    Variant("published loop", _make_published, target="published", missing=_needs_plain_head),
    # Last, because they tune or compile for longest: a run with a deadline loses these first.
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
    "QuACK CE, whole logits",
    "published loop",
)
"""Peers for which the logits of all tokens (of one prompt, for the loop) exist at once."""
