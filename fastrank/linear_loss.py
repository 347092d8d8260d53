"""The fused ranking loss: hidden rows, head and rewards in; loss and exact gradients out.

A ranking loss couples tokens only inside one prompt's group. So while a group's logits are there,
its loss and its logits' gradient can be made, and the logits be forgotten: 3 matrix products
instead of the 4 of a generic chunked cross-entropy, and memory for the logits of a few groups. The
price is that only one scalar can scale gradients made in the forward: ``reduction="none"``
therefore goes through `fastrank.token_logprobs`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup

import fastrank_kernels
from fastrank_kernels import Backend

from .arguments import Reduction, check_choice, check_tensor
from .function_loss import as_loss
from .logprobs import checked_projection
from .loss import Loss
from .outputs import RankingOutput
from .ranking import ranking_from_logprobs, reduce_groups


def linear_ranking_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    rewards: Tensor,
    *,
    cu_responses: Tensor,
    cu_groups: Tensor,
    loss: Loss | Callable[..., Any],
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    device_offsets: tuple[Tensor, Tensor] | None = None,
    reference_scores: Tensor | None = None,
    reduction: Reduction = "mean",
    logits_memory: int | None = None,
    vocab_group: ProcessGroup | None = None,
    validate: bool = False,
    backend: Backend | None = None,
) -> RankingOutput:
    """Ranking term plus supervised term of G groups of C candidates with T response tokens in all.

    Args:
        hidden: [T, D], the row *before* each response token; or [N, D] with ``rows``.
        weight: [V, D], the head. For dtypes see `fastrank.token_logprobs`.
        labels: int64 [T], the response tokens, candidate after candidate.
        rewards: [C], higher is better.
        cu_responses: int32 [C + 1], candidate i's tokens are ``cu_responses[i]`` to
            ``cu_responses[i + 1]``; none may be empty. On the host, best; a CUDA tensor costs one
            synchronisation and is checked only with ``validate``.
        cu_groups: int32 [G + 1], group g's candidates, likewise.
        loss: e.g. ``fastrank.RRHF()``, or a function, see `fastrank.FunctionLoss`, whose gradient
            goes through `fastrank.token_logprobs`.
        device_offsets: copies of ``cu_responses`` and ``cu_groups`` beside ``hidden``, as a
            `fastrank.Pack` has them, where the offsets are on the host. Nothing is copied to a GPU
            then, which a step captured in a CUDA graph needs. ``reduction="none"`` and a function
            of one's own copy the offsets all the same and cannot be captured.
        rows: int64 [T], the hidden row that predicts each label; a prompt's last row serves every
            one of its responses.
        bias: [V]. softcap: κ > 0. logit_scale: σ, in ``z = κ tanh(σ (W h + b) / κ)``.
        reference_scores: [C], the reference model's scores, normalised as the loss says; for a
            loss with ``uses_reference`` (DPO, IPO, ...), which is reference-free without.
        reduction: ``"mean"`` over groups, ``"sum"`` (to normalise by a global count), or ``"none"``
            for one value per group.
        logits_memory: bytes of logits that may exist at once; None for the device's default. A
            group that does not fit costs one more matrix product.
        vocab_group: the processes among which the vocabulary is divided (tensor parallelism), in
            the order of their parts. ``weight`` and ``bias`` are this process's own rows then, and
            everything else is the same on all of them. So is the result, with the gradient of
            ``hidden``; that of ``weight`` stays where the rows are. Three collectives per chunk of
            rows. The first call with new sizes exchanges these.
        validate: also check values that live on a GPU, which waits for it.
        backend: ``"torch"``, ``"triton"``, or None for the device's own.

    Returns:
        `RankingOutput`; only ``loss`` carries gradients. The mean over no group at all is 0.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or value.
    """
    loss = as_loss(loss)
    check_choice("reduction", reduction, Reduction)
    call = checked_projection(
        hidden, weight, labels, rows, bias, softcap, logit_scale, logits_memory, vocab_group,
        validate, backend,
    )  # fmt: skip
    check_tensor("cu_responses", cu_responses, ("C + 1",), kind="offsets")
    check_tensor("cu_groups", cu_groups, ("G + 1",), kind="offsets")
    candidates = cu_responses.shape[0] - 1
    check_tensor("rewards", rewards, (candidates,), device=hidden.device)
    if device_offsets is not None:
        for name, copy, like in zip(
            ("cu_responses", "cu_groups"), device_offsets, (cu_responses, cu_groups), strict=True
        ):
            name = f"device_offsets of {name}"
            check_tensor(name, copy, tuple(like.shape), kind="offsets", device=hidden.device)
    if reference_scores is not None:
        if not loss.uses_reference:
            raise ValueError(
                f"reference_scores needs a loss with uses_reference=True, got {loss!r}"
            )
        check_tensor("reference_scores", reference_scores, (candidates,), device=hidden.device)
    if reduction == "none" or loss.own_term is not None:
        return ranking_from_logprobs(
            fastrank_kernels.linear_logprobs(call),
            rewards,
            cu_responses=cu_responses,
            cu_groups=cu_groups,
            loss=loss,
            reference_scores=reference_scores,
            reduction=reduction,
            validate=validate,
            backend=backend,
        )
    total, rank_loss, sft_loss, scores, logprobs = fastrank_kernels.linear_ranking(
        call,
        rewards,
        cu_responses=cu_responses,
        cu_groups=cu_groups,
        spec=loss.spec(),
        reference_scores=reference_scores,
        scale=None if reduction == "mean" else 1.0,
        device_offsets=device_offsets,
    )
    rank_loss, sft_loss = reduce_groups(rank_loss, reduction), reduce_groups(sft_loss, reduction)
    return RankingOutput(total, rank_loss, sft_loss, scores, logprobs)
