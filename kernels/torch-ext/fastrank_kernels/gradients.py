"""Where the gradients of hidden rows and head are gathered, chunk by chunk.

Sums over chunks are kept in float32 whatever the inputs' dtype, so that cutting the work into
chunks costs no accuracy, and are cast once at the end, where the parameter is narrower. float16
gets float32 results to the end: its range is too small for a gradient before the upstream factor is
known.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import host_memory
from .products import product, wide_is_free
from .projection import Projection
from .reference import accumulation_dtype


class Gradients(NamedTuple):
    """Gradients of one call, in its `Projection.gradient_dtypes`; None where none was asked
    for."""

    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None


class GradientSums:
    """The gradients of a call (hidden and weight cast) over ``chunks`` chunks of rows.

    ``sparse``: not every row will be added, and the others' gradient is 0.
    """

    def __init__(self, call: Projection, *, chunks: int, sparse: bool) -> None:
        self._call = call
        self._hidden: Tensor | None = None
        if call.need_hidden:
            self._hidden = hidden_gradient(call, sparse=sparse)
        # One chunk needs no sum: the product's own float32 accumulation is rounded once. A CPU that
        # multiplies narrow matrices fast would take longer to spare a wider head that rounding.
        dtype, device = call.weight.dtype, call.weight.device
        wanted = call.gradient_dtypes[1]
        narrow = dtype == wanted or not (dtype == torch.float16 or wide_is_free(device, dtype))
        self._sum_dtype = dtype if chunks == 1 and narrow else accumulation_dtype(dtype)
        self._weight: Tensor | None = None
        self._bias: Tensor | None = None

    def add(
        self, at: slice | Tensor, dlogits: Tensor, hidden: Tensor, factor: Tensor | None = None
    ) -> None:
        """Add what the labels ``at`` contribute, given their logits' gradient and hidden rows.

        The gradient's rows are still to be multiplied by ``factor`` [rows], if there is one: it is
        applied to what they are multiplied with, and to what comes out.
        """
        if self._hidden is not None:
            set_rows(self._call, self._hidden, at, dlogits, factor)
        _, need_weight, need_bias = self._call.needs
        if need_bias:
            part = _column_sums(dlogits, factor)
            self._bias = part if self._bias is None else self._bias.add_(part)
        if not need_weight:
            return
        if factor is not None:
            hidden = torch.mul(hidden, factor[:, None], out=torch.empty_like(hidden))
        if first := self._weight is None:
            shape = (dlogits.shape[1], hidden.shape[1])
            self._weight = host_memory.empty(shape, self._sum_dtype, dlogits.device)
        product(dlogits.t(), hidden, self._weight, add=not first)

    def finish(self, lift: float | Tensor | None = None) -> Gradients:
        """The sums, divided by ``lift``; zeros where nothing was added."""
        call = self._call
        _, weight_dtype, bias_dtype = call.gradient_dtypes
        weight, bias = self._weight, self._bias
        if call.needs[1] and weight is None:
            weight = call.weight.new_zeros(call.weight.shape, dtype=weight_dtype)
        if call.needs[2] and bias is None:
            bias = call.weight.new_zeros(call.weight.shape[0], dtype=bias_dtype)
        gradients = Gradients(
            None
            if self._hidden is None
            else scatter_rows(self._hidden, call.rows, call.hidden.shape[0]),
            None if weight is None else weight.to(weight_dtype),
            None if bias is None else bias.to(bias_dtype),
        )
        if lift is not None:
            for gradient in gradients:
                if gradient is not None:
                    gradient /= lift
        return gradients


def hidden_gradient(call: Projection, *, sparse: bool) -> Tensor:
    """Memory for the gradient of the gathered hidden rows, [T, D]."""
    make = torch.zeros if sparse else torch.empty
    shape = (call.num_tokens, call.hidden.shape[1])
    return make(shape, dtype=call.gradient_dtype, device=call.hidden.device)


def set_rows(
    call: Projection,
    grad: Tensor,
    at: slice | Tensor,
    dlogits: Tensor,
    factor: Tensor | None = None,
) -> None:
    """Rows ``at`` of the hidden rows' gradient: ``dlogits @ weight``, times ``factor`` [rows];
    summed over the processes that share the vocabulary."""
    weight, shard = call.weight, call.vocab_shard
    shape = (dlogits.shape[0], grad.shape[1])
    if shard is not None:
        part = grad.new_empty(shape, dtype=accumulation_dtype(grad.dtype))
        grad[at] = shard.sum(product(dlogits, weight, part)).to(grad.dtype)
        return
    if factor is None and isinstance(at, slice):
        product(dlogits, weight, grad[at])
        return
    if factor is None:
        grad[at] = product(dlogits, weight, grad.new_empty(shape))
        return
    # Not rounded before it meets its factor.
    made = product(dlogits, weight, grad.new_empty(shape, dtype=accumulation_dtype(grad.dtype)))
    torch.mul(made, factor[:, None], out=grad[at])


def scatter_rows(grad: Tensor, rows: Tensor | None, num_hidden: int) -> Tensor:
    """Sum the gradients [T, D] of gathered rows into the hidden rows [N, D] they came from.

    A repeated row (a prompt's last row serves every response) is summed in float32, in a fixed
    order.
    """
    if rows is None:
        return grad
    wide = accumulation_dtype(grad.dtype)
    if grad.device.type == "cpu":
        out = torch.zeros(num_hidden, grad.shape[1], dtype=wide)
        return out.index_add_(0, rows, grad.to(wide)).to(grad.dtype)
    # index_add_ is atomic on a GPU: another order every time. Sorted segments are not.
    ordered, order = torch.sort(rows, stable=True)
    bounds = torch.searchsorted(
        ordered, torch.arange(num_hidden + 1, device=rows.device, dtype=rows.dtype)
    )
    summed = torch.segment_reduce(grad[order].to(wide), "sum", offsets=bounds, initial=0)
    return summed.to(grad.dtype)


def _column_sums(dlogits: Tensor, factor: Tensor | None) -> Tensor:
    """``Σ_t factor_t · dlogits_t``, [V], in float32 at least."""
    wide = accumulation_dtype(dlogits.dtype)
    if factor is None:
        return dlogits.sum(0, dtype=wide)
    # The factors as two narrow numbers each, which hold them to float32's accuracy nearly, so that
    # a product reads the matrix as it is; eight columns keep that product's rows aligned.
    parts = dlogits.new_zeros(dlogits.shape[0], 8)
    parts[:, 0] = factor
    parts[:, 1] = factor - parts[:, 0]
    sums = product(dlogits.t(), parts, dlogits.new_empty(dlogits.shape[1], 8, dtype=wide))
    return sums[:, 0] + sums[:, 1]
