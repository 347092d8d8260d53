"""The call that every operator over logits is given, and the memory its logits are made in."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from . import host_memory, reference
from .dispatch import backend_module
from .head_cast import cast_head
from .planner import row_pitch
from .products import product, writes_wide
from .reference import accumulation_dtype
from .shards import VocabShard


class Projection(NamedTuple):
    """Hidden rows, the head they are multiplied with and the labels, and how it is computed.

    T labels, N hidden rows of width D, V vocabulary entries. The logits of a row h are
    ``z = κ tanh(σ (W h + b) / κ)``, or ``z = σ (W h + b)`` without a softcap κ.
    """

    hidden: Tensor
    """[T, D], or [N, D] with ``rows``."""
    weight: Tensor
    """W, [V, D]."""
    labels: Tensor
    """int64 [T]."""
    rows: Tensor | None = None
    """int64 [T]: the hidden row that predicts each label."""
    bias: Tensor | None = None
    """b, [V]."""
    logit_scale: float = 1.0
    """σ."""
    softcap: float | None = None
    """κ."""
    compute_dtype: torch.dtype | None = None
    """What the products are made in; None for hidden's own dtype."""
    head_dtype: torch.dtype | None = None
    """The dtype of the head that ``weight`` is a copy of: set by `cast`."""
    logits_memory: int | None = None
    """Bytes of logits that may exist at once; None for the device's default."""
    validate: bool = False
    """Whether values that live on a GPU are checked too, which waits for it."""
    backend: str | None = None
    """``"torch"``, ``"triton"``, or None for the device's own."""
    needs: Sequence[bool] = (False, False, False)
    """Whether hidden, weight and bias are differentiated: set by `autograd`."""
    shard: str | None = None
    """The rows of the head that this process holds, by `shards.VocabShard`; None for all."""

    def cast(self) -> Projection:
        """The same call with hidden and weight in the dtype of the products."""
        dtype = self.compute_dtype or self.hidden.dtype
        return self._replace(
            hidden=self.hidden.to(dtype),
            weight=cast_head(self.weight, dtype),
            head_dtype=self.head_dtype or self.weight.dtype,
        )

    def take(self, at: slice | Tensor) -> Tensor:
        """The hidden rows that predict the labels ``at``."""
        return self.hidden[at] if self.rows is None else self.hidden[self.rows[at]]

    @property
    def module(self) -> ModuleType:
        return backend_module(self.backend, self.hidden.device, self.hidden.dtype)

    @property
    def num_tokens(self) -> int:
        return self.labels.shape[0]

    @property
    def vocab_shard(self) -> VocabShard | None:
        return None if self.shard is None else VocabShard.decode(self.shard)

    @property
    def need_hidden(self) -> bool:
        return self.needs[0]

    @property
    def need_head(self) -> bool:
        return self.needs[1] or self.needs[2]

    @property
    def logits_dtype(self) -> torch.dtype:
        """float32 from narrow inputs where the vendor's library can (CUDA), else their own."""
        compute, device = self.hidden.dtype, self.hidden.device
        narrow = compute in (torch.bfloat16, torch.float16)
        return torch.float32 if narrow and writes_wide(device) else compute

    @property
    def one_pass(self) -> bool:
        """Whether statistics and gradient are made in one pass over the logits (`unit_dlogits`): by
        the kernels in bfloat16. A CPU's products take longer than a second pass, and its dead rows
        are known before it; a shard's pass does not know the rest of the row, which the label's
        place needs."""
        narrow = self.hidden.dtype == torch.bfloat16
        return narrow and self.shard is None and self.module is not reference

    @property
    def gradient_dtype(self) -> torch.dtype:
        """The inputs' own, but float32 for float16, whose range is too small for a gradient before
        the upstream factor is known."""
        dtype = self.hidden.dtype
        return torch.float32 if dtype == torch.float16 else dtype

    @property
    def gradient_dtypes(self) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
        """Of the gradients of hidden, weight and bias: `gradient_dtype`, but float32 for a weight
        or bias that is itself wider than the products. Their sums are made in float32 or wider and
        reach the parameter without being rounded on the way."""
        narrow, compute = self.gradient_dtype, self.hidden.dtype
        head = self.head_dtype or self.weight.dtype
        bias = head if self.bias is None else self.bias.dtype
        wide = accumulation_dtype(compute)
        weight_dtype, bias_dtype = (
            wide if own.itemsize > compute.itemsize else narrow for own in (head, bias)
        )
        return narrow, weight_dtype, bias_dtype


class Logits:
    """The one buffer in which every chunk of logits is made, and its gradient after it.

    Its rows have an aligned pitch; a matrix is a view of their first V columns.
    """

    def __init__(self, call: Projection, chunk_rows: int) -> None:
        self._call, self._module, self._shard = call, call.module, call.vocab_shard
        shape = (chunk_rows, row_pitch(call.weight.shape[0]))
        self.memory = host_memory.empty(shape, call.logits_dtype, call.hidden.device)
        self._separate: Tensor | None = None

    def make(self, hidden: Tensor) -> Tensor:
        """``hidden @ weightᵀ`` for a chunk, [rows, V]; overwrites the chunk before."""
        weight = self._call.weight
        return product(hidden, weight.t(), self.memory[: hidden.shape[0], : weight.shape[0]])

    def statistics(self, logits: Tensor, at: slice) -> tuple[Tensor, Tensor]:
        """Log-sum-exp and log-probability of the labels ``at`` from their logits."""
        call, shard = self._call, self._shard
        labels = self._labels(at)
        stats: tuple[Tensor, Tensor] = self._module.row_stats(
            logits, labels, call.bias, call.logit_scale, call.softcap, sharded=shard is not None
        )
        return stats if shard is None else shard.merge(*stats, labels)

    def _labels(self, at: slice | Tensor) -> Tensor:
        """The labels ``at`` as columns of the logits."""
        labels = self._call.labels[at]
        return labels if self._shard is None else labels - self._shard.first

    def unit_gradient(self, logits: Tensor, at: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probability of the labels ``at``, and its gradient by the logits as the rows of a
        matrix, over this buffer, and their factors."""
        call = self._call
        out = rows_over(self.memory, logits, call.hidden.dtype)
        logp, factor = self._module.unit_dlogits(
            logits, call.labels[at], call.bias, call.logit_scale, call.softcap, out=out
        )
        return logp, factor, out

    def gradient(
        self,
        logits: Tensor,
        at: slice | Tensor,
        lse: Tensor,
        logp: Tensor,
        coefficients: Tensor,
        live: Tensor | None = None,
        *,
        keep_logits: bool = False,
    ) -> Tensor:
        """Gradient of a chunk's logits in the dtype of the products, over this buffer where that
        is safe; ``at`` are the labels' places, the other arguments are the chunk's own."""
        call = self._call
        compute = call.hidden.dtype
        # A kernel's programs move the rows of a compaction all at once: they need a place of
        # their own. The reference moves them one block after the other.
        if keep_logits or (live is not None and self._module is not reference):
            out = self._apart(logits, logits.shape[0] if live is None else live.numel())
        else:
            out = rows_over(self.memory, logits, compute)
        gradient: Tensor = self._module.dlogits(
            logits, self._labels(at), lse, logp, coefficients, call.bias, call.logit_scale,
            call.softcap, out=out, live=live, sharded=self._shard is not None,
        )  # fmt: skip
        return gradient

    def _apart(self, logits: Tensor, rows: int) -> Tensor:
        """Memory for ``rows`` rows of a gradient beside the logits, used again for each chunk."""
        if self._separate is None or self._separate.shape[0] < rows:
            shape, dtype = (rows, self.memory.shape[1]), self._call.hidden.dtype
            self._separate = host_memory.empty(shape, dtype, logits.device)
        return self._separate[:rows, : logits.shape[1]]


def rows_over(memory: Tensor, logits: Tensor, dtype: torch.dtype) -> Tensor:
    """A matrix of the logits' shape in a no wider dtype, over the rows of their memory."""
    return memory.view(dtype)[: logits.shape[0], : logits.shape[1]]
