# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Gradient of the weighted log-probabilities by the logits, over the logits if wanted.

One program per row, blocks in rising order. Written over the logits it needs no second buffer,
which for a float32 chunk is half of all memory that the loss takes. The narrower row lies in the
front half of the wide one, so a block's store lands on logits that this program has read before,
but perhaps not yet in all its warps: warps drift apart without limit. A barrier between load and
store in *every* block is what makes it right; a separate ``out`` goes without.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device_math import load_block, negative_expm1, store_block
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


@triton.jit
def write_block(
    columns,
    logits,
    bias,
    out,
    label,
    at_label,
    row_lse,
    c,
    vocab,
    read_end,
    write_end,
    logit_scale,
    softcap,
    IN_PLACE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The gradient of one block of a row."""
    z = load_block(logits, bias, columns, vocab, read_end, logit_scale, softcap, MASKED)
    # onehot - p in float32 before any cast: rounded probabilities lose confident tokens.
    grad = tl.where(columns == label, at_label, tl.exp(z - row_lse) * -c)
    if softcap is not None:
        ratio = z * (1.0 / softcap)
        grad *= 1.0 - ratio * ratio
    if logit_scale is not None:
        grad *= logit_scale
    if IN_PLACE:
        tl.debug_barrier()
    store_block(out, columns, grad, write_end, MASKED)


@triton.jit(do_not_specialize=["labels", "lse", "logp", "coefficients", "live"])
def dlogits_kernel(
    logits,
    labels,
    lse,
    logp,
    coefficients,
    bias,
    live,
    out,
    vocab,
    read_end,
    write_end,
    stride,
    out_stride,
    logit_scale,
    softcap,
    IN_PLACE: tl.constexpr,
    SHARDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    out_row = tl.program_id(0).to(tl.int64)
    row = out_row
    if live is not None:
        row = tl.load(live + out_row).to(tl.int64)
    logits += row * stride
    out += out_row * out_stride
    row_lse = tl.load(lse + row).to(tl.float32)
    row_logp = tl.load(logp + row).to(tl.float32)
    c = tl.load(coefficients + row).to(tl.float32)
    label = tl.load(labels + row)
    if SHARDED:
        label = tl.where((label >= 0) & (label < vocab), label, -1).to(tl.int32)
    else:
        # A label outside the vocabulary has NaN in logp; clamped, it puts that NaN into the row.
        label = tl.minimum(tl.maximum(label, 0), vocab - 1).to(tl.int32)
    at_label = negative_expm1(row_logp) * c
    finite = (tl.abs(row_lse) < float("inf")) & (row_logp == row_logp)
    lanes = tl.arange(0, BLOCK)
    whole = vocab // BLOCK * BLOCK
    if (c == 0.0) & finite:
        # Zero whatever the logits are: a dead row is written without being read.
        zero = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, whole, BLOCK):
            store_block(out, start + lanes, zero, write_end, MASKED=False)
        store_block(out, whole + lanes, zero, write_end, MASKED=True)
    else:
        for start in range(0, whole, BLOCK):
            write_block(
                start + lanes, logits, bias, out, label, at_label, row_lse, c, vocab, read_end,
                write_end, logit_scale, softcap, IN_PLACE, MASKED=False,
            )  # fmt: skip
        if whole < vocab:
            write_block(
                whole + lanes, logits, bias, out, label, at_label, row_lse, c, vocab, read_end,
                write_end, logit_scale, softcap, IN_PLACE, MASKED=True,
            )  # fmt: skip


def overlays(logits: Tensor, out: Tensor) -> bool:
    """Whether ``out`` lies over ``logits`` row by row; ValueError if it overlaps in another way."""
    rows, vocab = logits.shape
    if rows == 0 or vocab == 0 or out.shape[0] == 0:
        return False
    pitch, out_pitch = (t.stride(0) * t.element_size() for t in (logits, out))
    width, out_width = (vocab * t.element_size() for t in (logits, out))
    begin, out_begin = logits.data_ptr(), out.data_ptr()
    end = begin + (rows - 1) * pitch + width
    out_end = out_begin + (out.shape[0] - 1) * out_pitch + out_width
    if end <= out_begin or out_end <= begin:
        return False
    if pitch == out_pitch:
        shift = (out_begin - begin) % pitch
        if shift >= width and shift + out_width <= pitch:
            return False
    same_rows = begin == out_begin and (pitch == out_pitch or rows == 1)
    if not same_rows or out_width > width:
        raise ValueError(
            "out must be separate from logits, or lie over it row by row from the same address in "
            f"no wider type, got row pitches of {pitch} and {out_pitch} bytes at a distance of "
            f"{out_begin - begin} bytes"
        )
    return True


def plan_dlogits(
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    logp: Tensor,
    coefficients: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    out: Tensor,
    live: Tensor | None,
    sharded: bool = False,
) -> Launch:
    """The launch that `dlogits` does, for tensors on any device."""
    rows, vocab = logits.shape
    in_place = overlays(logits, out)
    if in_place and live is not None:
        raise ValueError(
            "out must be separate from logits when live is given (its programs run in any order "
            "and would overwrite rows not yet read), got out over logits"
        )
    arguments, num_warps = row_arguments(logits, labels, bias, logit_scale, softcap)
    arguments |= {
        "lse": lse.contiguous(),
        "logp": logp.contiguous(),
        "coefficients": coefficients.contiguous(),
        "live": None if live is None else live.contiguous(),
        "out": out,
        "write_end": write_end(logits, out) if in_place else vocab,
        "out_stride": out.stride(0),
        "IN_PLACE": in_place,
        "SHARDED": sharded,
    }
    count = rows if live is None else live.numel()
    # Left to itself ptxas takes 64 registers for some of the narrow types, and spills.
    max_registers = None if logits.dtype == torch.float32 else 80
    return Launch(
        dlogits_kernel, (count,), arguments, num_warps, fp_fusion=True, max_registers=max_registers
    )


def dlogits(
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    logp: Tensor,
    coefficients: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    *,
    out: Tensor,
    live: Tensor | None = None,
    sharded: bool = False,
) -> Tensor:
    """`reference.dlogits` as one launch: d(Σ_t coefficients_t · logp_t) / d logits, in ``out``.

    ``out`` [rows or more, V] is ``logits`` itself, a no wider type laid over its memory row by row,
    or a buffer of its own. Unlike the reference, ``live`` needs a buffer of its own: rows are
    written in no fixed order. ValueError for that, and for a wrong device, dtype, shape or stride.
    """
    require_device(
        logits=logits,
        labels=labels,
        lse=lse,
        logp=logp,
        coefficients=coefficients,
        bias=bias,
        out=out,
        live=live,
    )
    require_dtype(
        FLOATS, logits=logits, lse=lse, logp=logp, coefficients=coefficients, bias=bias, out=out
    )
    require_dtype(INTEGERS, labels=labels, live=live)
    require_rows(logits=logits, out=out)
    rows, vocab = logits.shape
    require_shape((rows,), labels=labels, lse=lse, logp=logp, coefficients=coefficients)
    require_shape((vocab,), bias=bias)
    count = rows if live is None else live.numel()
    if out.shape[0] < count or out.shape[1] != vocab:
        raise ValueError(f"out must have shape [{count} or more, {vocab}], got {tuple(out.shape)}")
    require_separate_rows(out=out[:count])
    launch = plan_dlogits(
        logits, labels, lse, logp, coefficients, bias, logit_scale, softcap, out, live, sharded
    )
    run(launch, logits.device)
    return out[:count]
