# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Row statistics and logits gradient in one pass, for bfloat16 gradients of float32 logits.

The gradient's coefficients depend on the statistics of every row of a group, which seems to need a
second pass over the logits. It does not, because a coefficient multiplies a whole row. With
``e_v = exp(z_v - ref)``, their sum S and the label y, the derivative of ``logp`` by the logits is
``-1 / S`` times E, where

    ``E_v = e_v`` off the label, and ``E_y = -Σ_{v≠y} e_v``, which is a sum without cancellation.

One pass writes E before it knows S; ``-1 / S`` then joins the coefficient on the *rows* of the
products that follow: ``dh = diag(c / -S) (E W)`` and ``dW = Eᵀ (diag(c / -S) H)``. A logit costs 4
bytes read and 2 written instead of 8 read and 2 written.

``ref`` is a running maximum that follows only jumps of more than ``SLACK``; what the row holds by
then is brought to the new reference, which after the first block hardly ever happens. Exponentials
reach ``exp(SLACK)``, far inside bfloat16's range and far outside float16's, which takes two passes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device_math import load_block, load_target, store_block
from .dlogits import overlays
from .launch import (
    FLOATS,
    INTEGERS,
    Launch,
    require_device,
    require_dtype,
    require_rows,
    require_separate_rows,
    require_shape,
    run,
    write_end,
)
from .row_stats import row_arguments

SLACK = 40.0


@triton.jit
def add_block(
    start,
    logits,
    bias,
    out,
    spot,
    reference,
    others,
    vocab,
    read_end,
    write_end,
    logit_scale,
    softcap,
    SLACK: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the exponentials of one block; the reference and the sum of all but the label's."""
    columns = start + tl.arange(0, BLOCK)
    z = load_block(logits, bias, columns, vocab, read_end, logit_scale, softcap, MASKED)
    # The narrow row lies in the front half of the wide one. No thread can store before all have
    # loaded: what is stored depends on this maximum, and the maximum on every load.
    top = tl.max(z, 0)
    if top > reference + SLACK:
        factor = tl.exp(reference - top)
        others *= factor
        tl.debug_barrier()
        for back in range(0, start, BLOCK):
            there = out + back + tl.arange(0, BLOCK)
            tl.store(there, (tl.load(there).to(tl.float32) * factor).to(out.dtype.element_ty))
        reference = top
    exponential = tl.where(columns == spot, 0.0, tl.exp(z - reference))
    others += exponential
    if softcap is not None:
        ratio = z * (1.0 / softcap)
        exponential *= 1.0 - ratio * ratio
    store_block(out, columns, exponential, write_end, MASKED)
    return reference, others


@triton.jit(do_not_specialize=["labels", "logp", "factor"])
def unit_dlogits_kernel(
    logits,
    labels,
    bias,
    out,
    logp,
    factor,
    vocab,
    read_end,
    write_end,
    stride,
    out_stride,
    logit_scale,
    softcap,
    SLACK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    out += row * out_stride
    label = tl.load(labels + row)
    target, known = load_target(logits, bias, label, vocab, logit_scale, softcap)
    spot = tl.where(known, label, -1).to(tl.int32)
    # Finite, so that -inf - reference is -inf and not NaN.
    reference = -3.4028234663852886e38
    others = tl.zeros((BLOCK,), tl.float32)
    whole = vocab // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        reference, others = add_block(
            start, logits, bias, out, spot, reference, others, vocab, read_end, write_end,
            logit_scale, softcap, SLACK, False, BLOCK,
        )  # fmt: skip
    if whole < vocab:
        reference, others = add_block(
            whole, logits, bias, out, spot, reference, others, vocab, read_end, write_end,
            logit_scale, softcap, SLACK, True, BLOCK,
        )  # fmt: skip
    rest = tl.sum(others, 0)
    total = rest + tl.exp(target - reference)
    row_lse = tl.where(reference == float("inf"), reference, reference + tl.log(total))
    row_logp = target - row_lse
    # Rounding can lift the label's logit above the log-sum-exp; a log-probability is never > 0.
    row_logp = tl.where(row_logp > 0.0, 0.0, row_logp)
    tl.store(logp + row, tl.where(known, row_logp, float("nan")))
    scale = -1.0 / total
    if logit_scale is not None:
        scale *= logit_scale
    tl.store(factor + row, scale)
    at_label = -rest
    if softcap is not None:
        ratio = target * (1.0 / softcap)
        at_label *= 1.0 - ratio * ratio
    at_label = tl.where(known, at_label, float("nan")).to(out.dtype.element_ty)
    # The label's place was written with its block, perhaps by another thread.
    tl.debug_barrier()
    place = tl.minimum(tl.maximum(label, 0), vocab - 1)
    tl.store(out + place, at_label)


def plan_unit_dlogits(
    logits: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    out: Tensor,
    logp: Tensor,
    factor: Tensor,
) -> Launch:
    """The launch that `unit_dlogits` does, for tensors on any device."""
    rows, vocab = logits.shape
    arguments, num_warps = row_arguments(logits, labels, bias, logit_scale, softcap)
    arguments |= {
        "out": out,
        "logp": logp,
        "factor": factor,
        "write_end": write_end(logits, out) if overlays(logits, out) else vocab,
        "out_stride": out.stride(0),
        "SLACK": SLACK,
    }
    return Launch(
        unit_dlogits_kernel, (rows,), arguments, num_warps, fp_fusion=True, max_registers=80
    )


def unit_dlogits(
    logits: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    *,
    out: Tensor,
) -> tuple[Tensor, Tensor]:
    """`reference.unit_dlogits` as one launch: ``logp`` and ``factor``, both float32 [rows].

    ``factor[:, None] * out`` is the derivative of ``logp`` by the logits, row by row. ``logits``
    [rows, V] are float32, bfloat16 or float16 and are overwritten where ``out`` [rows, V], float32
    or bfloat16, lies over them. ValueError for a wrong device, dtype, shape or stride.
    """
    require_device(logits=logits, labels=labels, bias=bias, out=out)
    require_dtype(FLOATS, logits=logits, bias=bias)
    require_dtype((torch.float32, torch.bfloat16), out=out)
    require_dtype(INTEGERS, labels=labels)
    require_rows(logits=logits, out=out)
    rows, vocab = logits.shape
    require_shape((rows,), labels=labels)
    require_shape((vocab,), bias=bias)
    require_shape((rows, vocab), out=out)
    require_separate_rows(out=out)
    logp = torch.empty(rows, dtype=torch.float32, device=logits.device)
    factor = torch.empty_like(logp)
    launch = plan_unit_dlogits(logits, labels, bias, logit_scale, softcap, out, logp, factor)
    run(launch, logits.device)
    return logp, factor
