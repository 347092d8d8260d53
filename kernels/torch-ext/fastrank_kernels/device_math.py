# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Elementary functions for the kernels, written with what triton's core language has.

``libdevice`` would give tanh, expm1 and log1p, but it is neither in the interpreter, on which the
tests run without a GPU, nor the same library on every vendor. Each function here is accurate to
about two units in the last place of float32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """Hyperbolic tangent: an odd polynomial (least squares on [-0.5, 0.5]) where the quotient of
    exponentials would cancel, the quotient elsewhere. NaN stays NaN, ±inf gives ±1."""
    square = x * x
    series = -0.05338326096534729 + square * 0.01797856017947197
    series = 0.1333044022321701 + square * series
    series = -0.3333331048488617 + square * series
    small = x + x * square * series
    decay = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - decay) / (1.0 + decay)
    return tl.where(tl.abs(x) < 0.5, small, tl.where(x < 0, -large, large))


@triton.jit
def negative_expm1(x):
    """``1 - exp(x)`` for ``x <= 0``, without cancelling near 0: Taylor's series down to -0.5."""
    series = 1.0 / 40320.0 + x * (1.0 / 362880.0)
    series = 1.0 / 5040.0 + x * series
    series = 1.0 / 720.0 + x * series
    series = 1.0 / 120.0 + x * series
    series = 1.0 / 24.0 + x * series
    series = 1.0 / 6.0 + x * series
    series = 0.5 + x * series
    series = 1.0 + x * series
    return tl.where(x > -0.5, -x * series, 1.0 - tl.exp(x))


@triton.jit
def log1p(x):
    """``log(1 + x)`` for ``x >= 0``. The quotient undoes the rounding of ``w = 1 + x``, because
    log(w) / (w - 1) hardly changes between neighbours (Kahan)."""
    rounded = 1.0 + x
    excess = rounded - 1.0
    return tl.where(excess == 0.0, x, tl.log(rounded) * x / tl.where(excess == 0.0, 1.0, excess))


@triton.jit
def final_logits(x, bias, columns, inside, logit_scale, softcap):
    """``z = κ tanh(σ(x + b) / κ)``, or ``σ(x + b)``, of one block of a row, in float32.

    ``bias`` and ``softcap`` are None where the model has none, ``logit_scale`` is None for 1, and
    ``inside`` is None where every column is one of the row's.
    """
    z = x.to(tl.float32)
    if bias is not None:
        if inside is None:
            z += tl.load(bias + columns).to(tl.float32)
        else:
            z += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    if logit_scale is not None:
        z *= logit_scale
    if softcap is not None:
        z = tanh(z * (1.0 / softcap)) * softcap
    return z


@triton.jit
def load_block(logits, bias, columns, vocab, read_end, logit_scale, softcap, MASKED: tl.constexpr):
    """Final logits of one block of a row. Masked, for a row's last block, places from ``vocab`` on
    are -inf; ``read_end`` is as `launch.read_end` says."""
    if MASKED:
        x = tl.load(logits + columns, mask=columns < read_end, other=0.0)
        inside = columns < vocab
        z = final_logits(x, bias, columns, inside, logit_scale, softcap)
        z = tl.where(inside, z, float("-inf"))
    else:
        x = tl.load(logits + columns)
        z = final_logits(x, bias, columns, None, logit_scale, softcap)
    return z


@triton.jit
def store_block(row, columns, values, write_end, MASKED: tl.constexpr):
    """Store one block of a row in the row's own type, up to ``write_end`` if masked."""
    values = values.to(row.dtype.element_ty)
    if MASKED:
        tl.store(row + columns, values, mask=columns < write_end)
    else:
        tl.store(row + columns, values)


@triton.jit
def load_target(logits, bias, label, vocab, logit_scale, softcap):
    """The label's final logit, and whether the label is in the vocabulary (if not: -inf)."""
    known = (label >= 0) & (label < vocab)
    x = tl.load(logits + label, mask=known, other=0.0)
    z = final_logits(x, bias, label, known, logit_scale, softcap)
    return tl.where(known, z, float("-inf")), known
