"""Where the gradients of hidden rows and head are gathered, chunk by chunk.

Sums over chunks are kept in float32 whatever the inputs' dtype, so that cutting the work into
chunks costs no accuracy, and are cast once at the end. float16 gets float32 results to the end: its
range is too small for a gradient before the upstream factor is known.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import host_memory
from .reference import accumulation_dtype

# Rows of the head whose partial product is added to a wider sum at a time (CPU).
_HEAD_BLOCK = 4096


class HiddenGrad:
    """Gradient of the gathered hidden rows, [T, D]; `scatter_rows` brings it back to [N, D]."""

    def __init__(self, rows: int, hidden: Tensor, compute: torch.dtype, *, zero: bool) -> None:
        dtype = torch.float32 if compute == torch.float16 else compute
        make = torch.zeros if zero else torch.empty
        self.grad = make(rows, hidden.shape[1], dtype=dtype, device=hidden.device)

    def add(self, at: slice | Tensor, dlogits: Tensor, weight: Tensor) -> None:
        """Rows ``at`` of the gradient are ``dlogits @ weight``."""
        if isinstance(at, slice) and self.grad.dtype == dlogits.dtype:
            torch.mm(dlogits, weight, out=self.grad[at])
        else:
            self.grad[at] = _product(dlogits, weight, self.grad.dtype)


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


class HeadGrad:
    """Gradient of the head's weight [V, D] and bias [V] over several chunks of rows."""

    def __init__(
        self,
        weight: Tensor,
        *,
        need_weight: bool,
        need_bias: bool,
        single_chunk: bool,
    ) -> None:
        self._weight = weight
        # One chunk needs no sum: the product's own float32 accumulation is rounded once.
        narrow = single_chunk and weight.dtype != torch.float16
        self._sum_dtype = weight.dtype if narrow else accumulation_dtype(weight.dtype)
        self._need_weight, self._need_bias = need_weight, need_bias
        self._dweight: Tensor | None = None
        self._dbias: Tensor | None = None

    def add(self, dlogits: Tensor, hidden: Tensor) -> None:
        """Add the contribution ``dlogitsᵀ @ hidden`` of one chunk."""
        if self._need_bias:
            part = dlogits.sum(0, dtype=accumulation_dtype(dlogits.dtype))
            self._dbias = part if self._dbias is None else self._dbias.add_(part)
        if not self._need_weight:
            return
        if self._dweight is None:
            shape = (dlogits.shape[1], hidden.shape[1])
            self._dweight = host_memory.empty(shape, self._sum_dtype, dlogits.device)
            self._add_product(self._dweight, dlogits, hidden, first=True)
        else:
            self._add_product(self._dweight, dlogits, hidden, first=False)

    def _add_product(self, total: Tensor, dlogits: Tensor, hidden: Tensor, *, first: bool) -> None:
        if total.dtype == dlogits.dtype:
            if first:
                torch.mm(dlogits.t(), hidden, out=total)
            else:
                total.addmm_(dlogits.t(), hidden)
            return
        if dlogits.device.type == "cuda":
            if first:
                torch.ops.aten.mm.dtype_out(dlogits.t(), hidden, total.dtype, out=total)
            else:
                torch.ops.aten.addmm.dtype_out(total, dlogits.t(), hidden, total.dtype, out=total)
            return
        # A CPU rounds a narrow product's result to its own dtype, which several chunks would pay
        # several times over: blocks of the head are multiplied in the sum's dtype instead.
        hidden = hidden.to(total.dtype)
        for start in range(0, total.shape[0], _HEAD_BLOCK):
            part = total[start : start + _HEAD_BLOCK]
            columns = dlogits[:, start : start + _HEAD_BLOCK].to(total.dtype)
            if first:
                torch.mm(columns.t(), hidden, out=part)
            else:
                part.addmm_(columns.t(), hidden)

    def finish(self) -> tuple[Tensor | None, Tensor | None]:
        """The two gradients, or None where none was asked for; float32 for a float16 head."""
        wide = torch.float32 if self._weight.dtype == torch.float16 else self._weight.dtype
        vocab, width = self._weight.shape
        device = self._weight.device
        dweight, dbias = self._dweight, self._dbias
        if self._need_weight and dweight is None:
            dweight = torch.zeros(vocab, width, dtype=wide, device=device)
        if self._need_bias and dbias is None:
            dbias = torch.zeros(vocab, dtype=wide, device=device)
        return (
            None if dweight is None else dweight.to(wide),
            None if dbias is None else dbias.to(wide),
        )


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    if left.dtype != dtype:
        return torch.ops.aten.mm.dtype(left, right, dtype)
    return torch.mm(left, right)
