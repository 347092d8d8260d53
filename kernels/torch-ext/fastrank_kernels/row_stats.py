# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Log-sum-exp and label log-probability of each row of a logits chunk, in one pass.

One program per row. Every lane keeps a maximum and a sum of its own over the blocks and the lanes
are merged once at the end: a block costs no reduction across the program, and one exponential an
element, ``exp(-|z - top|)``, serves the new term and the rescaling of the old sum alike. Splitting
a row over several programs would help chunks of very few rows only, at the price of a second
launch.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device_math import load_block, load_target
from .launch import (
    FLOATS,
    INTEGERS,
    Launch,
    power_of_two,
    read_end,
    require_device,
    require_dtype,
    require_rows,
    require_shape,
    run,
)


@triton.jit
def add_block(z, top, total):
    """Add one block's logits to the lanes' running maxima and sums."""
    # top starts finite, so that -inf - top is -inf and not NaN.
    decay = tl.exp(-tl.abs(z - top))
    higher = z > top
    total = tl.where(higher, total * decay + 1.0, total + decay)
    return tl.where(higher, z, top), total


@triton.jit(do_not_specialize=["labels", "lse", "logp"])
def row_stats_kernel(
    logits,
    labels,
    bias,
    lse,
    logp,
    vocab,
    read_end,
    stride,
    logit_scale,
    softcap,
    SHARDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    lowest = -3.4028234663852886e38
    top = tl.full((BLOCK,), lowest, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    lanes = tl.arange(0, BLOCK)
    whole = vocab // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        z = load_block(
            logits, bias, start + lanes, vocab, read_end, logit_scale, softcap, MASKED=False
        )
        top, total = add_block(z, top, total)
    if whole < vocab:
        z = load_block(
            logits, bias, whole + lanes, vocab, read_end, logit_scale, softcap, MASKED=True
        )
        top, total = add_block(z, top, total)
    peak = tl.max(top, 0)
    row_lse = peak + tl.log(tl.sum(total * tl.exp(top - peak), 0))
    row_lse = tl.where(peak == float("inf"), peak, row_lse)

    target, known = load_target(logits, bias, tl.load(labels + row), vocab, logit_scale, softcap)
    tl.store(lse + row, row_lse)
    if SHARDED:
        tl.store(logp + row, tl.where(known, target, 0.0))
    else:
        row_logp = target - row_lse
        # Rounding can lift the label's logit above the log-sum-exp; a log-probability is never > 0.
        row_logp = tl.where(row_logp > 0.0, 0.0, row_logp)
        tl.store(logp + row, tl.where(known, row_logp, float("nan")))


def block_of_row(vocab: int, dtype: torch.dtype) -> tuple[int, int]:
    """Elements of a block and warps of a program: 16 bytes or more per thread and load."""
    block = min(max(power_of_two(vocab), 32), 2048 if dtype == torch.float32 else 4096)
    return block, max(1, min(8, block // 256))


def row_arguments(
    logits: Tensor, labels: Tensor, bias: Tensor | None, logit_scale: float, softcap: float | None
) -> tuple[dict[str, Any], int]:
    """What every kernel over rows of logits is given, and the warps of its programs."""
    vocab = logits.shape[1]
    block, num_warps = block_of_row(vocab, logits.dtype)
    arguments = {
        "logits": logits,
        "labels": labels.contiguous(),
        "bias": None if bias is None else bias.contiguous(),
        "vocab": vocab,
        "read_end": read_end(logits),
        "stride": logits.stride(0),
        "logit_scale": None if logit_scale == 1.0 else float(logit_scale),
        "softcap": None if softcap is None else float(softcap),
        "BLOCK": block,
    }
    return arguments, num_warps


def plan_row_stats(
    logits: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    lse: Tensor,
    logp: Tensor,
    sharded: bool = False,
) -> Launch:
    """The launch that `row_stats` does, for tensors on any device."""
    arguments, num_warps = row_arguments(logits, labels, bias, logit_scale, softcap)
    arguments |= {"lse": lse, "logp": logp, "SHARDED": sharded}
    max_registers = None if logits.dtype == torch.float32 else 128
    return Launch(
        row_stats_kernel,
        (logits.shape[0],),
        arguments,
        num_warps,
        fp_fusion=True,
        max_registers=max_registers,
    )


def row_stats(
    logits: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    *,
    sharded: bool = False,
) -> tuple[Tensor, Tensor]:
    """`reference.row_stats` as one launch: ``lse`` and ``logp``, both float32 [rows].

    ``logits`` [rows, V] float32, bfloat16 or float16, rows contiguous, any row stride. A label
    outside the vocabulary is never read and gives NaN in ``logp``. ValueError for a wrong device,
    dtype, shape or stride.
    """
    require_device(logits=logits, labels=labels, bias=bias)
    require_dtype(FLOATS, logits=logits, bias=bias)
    require_dtype(INTEGERS, labels=labels)
    require_rows(logits=logits)
    rows, vocab = logits.shape
    require_shape((rows,), labels=labels)
    require_shape((vocab,), bias=bias)
    lse = torch.empty(rows, dtype=torch.float32, device=logits.device)
    logp = torch.empty_like(lse)
    launch = plan_row_stats(logits, labels, bias, logit_scale, softcap, lse, logp, sharded)
    run(launch, logits.device)
    return lse, logp
