"""From hidden rows to token log-probabilities and scores, without the logits ever existing at once.

This is the way for a ranking loss of one's own: `token_logprobs` → `sequence_scores` → any
function. The upstream gradient is only known in the backward, which therefore needs the logits a
second time, or room to keep them; `fastrank.linear_ranking_loss` contains the loss and does
without.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

import fastrank_kernels
from fastrank_kernels import Backend, Projection, agree_on_shard
from fastrank_kernels.host_memory import send

from .arguments import (
    LARGEST,
    Normalize,
    check_normalize,
    check_tensor,
    is_number,
    length_exponent,
)


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    logits_memory: int | None = None,
    vocab_group: ProcessGroup | None = None,
    validate: bool = False,
    backend: Backend | None = None,
) -> Tensor:
    """Log-probability of each label under ``z = κ tanh(σ (W h + b) / κ)``.

    Args:
        hidden: [T, D], the row *before* each label's token; or [N, D] with ``rows``.
        weight: [V, D], the head. Under autocast both are multiplied in autocast's dtype, otherwise
            in the wider of the two dtypes; the gradients come back in their own.
        labels: int64 [T]. Outside [0, V): an error on a CPU, NaN from a GPU kernel.
        rows: int64 [T], the hidden row that predicts each label; rows may repeat.
        bias: [V]. softcap: κ > 0. logit_scale: σ.
        logits_memory: bytes of logits that may exist at once; None for the device's default. It
            decides between keeping the logits (3 matrix products) and computing them twice (4);
            with a frozen head 2 products serve either way.
        vocab_group: the processes among which the vocabulary is divided, in the order of their
            parts; see `fastrank.linear_ranking_loss`.
        validate: also check values that live on a GPU, which waits for it.
        backend: ``"torch"``, ``"triton"``, or None for the device's own.

    Returns:
        float32 [T] (float64 for float64 inputs), differentiable in hidden, weight and bias.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or value.
    """
    return fastrank_kernels.linear_logprobs(
        checked_projection(
            hidden,
            weight,
            labels,
            rows,
            bias,
            softcap,
            logit_scale,
            logits_memory,
            vocab_group,
            validate,
            backend,
        )  # fmt: skip
    )


def sequence_scores(
    token_logprobs: Tensor, cu_responses: Tensor, *, normalize: Normalize = "mean"
) -> Tensor:
    """Score of each response: the mean of its tokens' log-probabilities, their sum, or between.

    Args:
        token_logprobs: [T].
        cu_responses: int32 [C + 1], rising from 0 to T: response i is
            ``token_logprobs[cu_responses[i]:cu_responses[i + 1]]``. The mean of an empty one is
            NaN.
        normalize: ``"mean"``, ``"sum"``, or α >= 0: the sum over ``|y|^α``.

    Returns:
        float32 [C] (float64 for float64), differentiable.

    >>> offsets = torch.tensor([0, 2, 3], dtype=torch.int32)
    >>> sequence_scores(torch.tensor([-1.0, -3.0, -5.0]), offsets)
    tensor([-2., -5.])
    """
    check_tensor("token_logprobs", token_logprobs, ("T",))
    check_tensor("cu_responses", cu_responses, ("C + 1",), kind="offsets")
    check_normalize("normalize", normalize)
    sums: Tensor = fastrank_kernels.segment_sum(token_logprobs, cu_responses)
    exponent = length_exponent(normalize)
    if exponent == 0.0:
        return sums
    lengths = cu_responses[1:] - cu_responses[:-1]
    lengths = send(lengths, sums.device).to(sums.dtype)
    # An empty response has no mean: 0 / 0 says so.
    return sums / fastrank_kernels.length_divisor(lengths, exponent)


def flatten(
    hidden: Tensor, labels: Tensor, *, ignore_index: int = -100
) -> tuple[Tensor, Tensor, Tensor]:
    """From a padded batch, as a ``Trainer`` has it, to rows, labels and offsets.

    Args:
        hidden: [B, L, D], the model's last hidden states, one candidate per row.
        labels: int64 [B, L], *not* shifted, ``ignore_index`` where nothing is to be predicted.

    Returns:
        ``rows`` int64 [T] into ``hidden.view(-1, D)`` (the row before each label's token),
        ``labels`` int64 [T], ``cu_responses`` int32 [B + 1] on the host. A CUDA batch is
        synchronised once.

    Raises:
        ValueError: a row without a label, or whose first token is one (no row predicts it).
    """
    check_tensor("hidden", hidden, ("B", "L", "D"))
    check_tensor("labels", labels, tuple(hidden.shape[:2]), kind="int64", device=hidden.device)
    keep = labels != ignore_index
    length = labels.shape[1]
    ahead = keep[:, 0] if length else keep.new_zeros(len(keep))
    counts, first = torch.stack([keep.sum(1), ahead.long()]).cpu()  # the one synchronisation
    if bool(first.any()):
        row = int(first.nonzero()[0])
        raise ValueError(f"labels must not begin at position 0 (no row predicts it), got row {row}")
    if not bool((counts > 0).all()):
        row = int((counts == 0).nonzero()[0])
        raise ValueError(f"labels must have a token in every row, got none in row {row}")
    cu_responses = torch.zeros(labels.shape[0] + 1, dtype=torch.int32)
    cu_responses[1:] = counts.cumsum(0)
    # The k-th label stands where the running count reaches k: nobody has to ask how many there are.
    running = keep.reshape(-1).cumsum(0)
    numbers = torch.arange(1, int(cu_responses[-1]) + 1, device=running.device)
    places = torch.searchsorted(running, numbers)
    return places - 1, labels.reshape(-1)[places], cu_responses


def checked_projection(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    logits_memory: int | None,
    vocab_group: ProcessGroup | None,
    validate: bool,
    backend: Backend | None,
) -> Projection:
    """The call of the operators, after the checks that every function over a head makes."""
    check_tensor("hidden", hidden, ("N", "D"))
    device = hidden.device
    check_tensor("weight", weight, ("V", hidden.shape[1]), device=device)
    if weight.shape[0] == 0:
        raise ValueError(f"weight must have at least one row, got {list(weight.shape)}")
    if rows is None:
        check_tensor("labels", labels, (hidden.shape[0],), kind="int64", device=device)
    else:
        check_tensor("labels", labels, ("T",), kind="int64", device=device)
        check_tensor("rows", rows, (labels.shape[0],), kind="int64", device=device)
    if bias is not None:
        check_tensor("bias", bias, (weight.shape[0],), device=device)
    # Compared, not looked at by math: a compiler may hold such a number for dynamic.
    if softcap is not None and not (is_number(softcap) and softcap > 0):
        raise ValueError(f"softcap must be positive or None, got {softcap!r}")
    if softcap is not None and not 1 / LARGEST <= softcap <= LARGEST:
        raise ValueError(
            f"softcap must lie from {1 / LARGEST:g} to {LARGEST:g}, or be None, got {softcap!r}"
        )
    if not (is_number(logit_scale) and -LARGEST <= logit_scale <= LARGEST):
        raise ValueError(f"logit_scale must lie within ±{LARGEST:g}, got {logit_scale!r}")
    if logits_memory is not None and (isinstance(logits_memory, float) or logits_memory <= 0):
        raise ValueError(f"logits_memory must be a positive number of bytes, got {logits_memory}")
    if backend not in (None, "torch", "triton"):
        raise ValueError(f"backend must be 'torch', 'triton' or None, got {backend!r}")
    shard = None
    if vocab_group is not None:
        if not isinstance(vocab_group, ProcessGroup):
            raise TypeError(
                "vocab_group must be a process group that this process is in, got "
                f"{type(vocab_group).__name__}"
            )
        found, logits_memory = agree_on_shard(vocab_group, weight.shape[0], logits_memory, device)
        shard = found.encode()
    return Projection(
        hidden=hidden,
        weight=weight,
        labels=labels,
        rows=rows,
        bias=bias,
        logit_scale=float(logit_scale),
        softcap=None if softcap is None else float(softcap),
        compute_dtype=compute_dtype(hidden, weight),
        logits_memory=logits_memory,
        validate=validate,
        backend=backend,
        shard=shard,
    )


def compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of the products of hidden rows and head: autocast's under autocast (but float64 for
    float64 inputs), else the wider of the two; float32 for float16 on a CPU, which has no fast
    float16 products."""
    wide = torch.promote_types(hidden.dtype, weight.dtype)
    kind = hidden.device.type
    if wide != torch.float64 and torch.is_autocast_enabled(kind):
        wide = torch.get_autocast_dtype(kind)
    if wide == torch.float16 and kind == "cpu":
        return torch.float32
    return wide
