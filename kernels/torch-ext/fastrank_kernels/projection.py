"""The call that every operator over logits is given, and the memory its logits are made in."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from . import host_memory, reference
from .dispatch import backend_module


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
    logits_memory: int | None = None
    """Bytes of logits that may exist at once; None for the device's default."""
    validate: bool = False
    """Whether values that live on a GPU are checked too, which waits for it."""
    backend: str | None = None
    """``"torch"``, ``"triton"``, or None for the device's own."""
    needs: Sequence[bool] = (False, False, False)
    """Whether hidden, weight and bias are differentiated: set by `autograd`."""

    def cast(self) -> Projection:
        """The same call with hidden and weight in the dtype of the products."""
        dtype = self.compute_dtype or self.hidden.dtype
        return self._replace(hidden=self.hidden.to(dtype), weight=self.weight.to(dtype))

    def take(self, at: slice | Tensor) -> Tensor:
        """The hidden rows that predict the labels ``at``."""
        return self.hidden[at] if self.rows is None else self.hidden[self.rows[at]]

    @property
    def module(self) -> ModuleType:
        return backend_module(self.backend, self.hidden.device)

    @property
    def num_tokens(self) -> int:
        return self.labels.shape[0]

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
        return torch.float32 if narrow and device.type == "cuda" else compute

    @property
    def gradient_dtype(self) -> torch.dtype:
        """The inputs' own, but float32 for float16, whose range is too small for a gradient before
        the upstream factor is known."""
        dtype = self.hidden.dtype
        return torch.float32 if dtype == torch.float16 else dtype


class Logits:
    """The one buffer in which every chunk of logits is made, and its gradient after it."""

    def __init__(self, call: Projection, chunk_rows: int) -> None:
        self._call, self._module = call, call.module
        shape = (chunk_rows, call.weight.shape[0])
        self.memory = host_memory.empty(shape, call.logits_dtype, call.hidden.device)

    def make(self, hidden: Tensor) -> Tensor:
        """``hidden @ weightᵀ`` for a chunk, [rows, V]; overwrites the chunk before."""
        logits = self.memory[: hidden.shape[0]]
        weight = self._call.weight.t()
        if logits.dtype == hidden.dtype:
            torch.mm(hidden, weight, out=logits)
        else:
            torch.ops.aten.mm.dtype_out(hidden, weight, logits.dtype, out=logits)
        return logits

    def statistics(self, logits: Tensor, at: slice) -> tuple[Tensor, Tensor]:
        """Log-sum-exp and log-probability of the labels ``at`` from their logits."""
        call = self._call
        stats: tuple[Tensor, Tensor] = self._module.row_stats(
            logits, call.labels[at], call.bias, call.logit_scale, call.softcap
        )
        return stats

    def gradient(
        self,
        logits: Tensor,
        at: slice | Tensor,
        lse: Tensor,
        logp: Tensor,
        coefficients: Tensor,
        live: Tensor | None = None,
    ) -> Tensor:
        """Gradient of a chunk's logits in the dtype of the products, over this buffer where that
        is safe; ``at`` are the labels' places, the other arguments are the chunk's own."""
        call = self._call
        compute = call.hidden.dtype
        rows, vocab = logits.shape
        # A kernel's programs move the rows of a compaction all at once: they need a place of
        # their own. The reference moves them one block after the other.
        if live is not None and self._module is not reference:
            out = torch.empty(live.numel(), vocab, dtype=compute, device=logits.device)
        else:
            out = self.memory.view(compute)[:rows, :vocab]
        gradient: Tensor = self._module.dlogits(
            logits, call.labels[at], lse, logp, coefficients,
            call.bias, call.logit_scale, call.softcap, out=out, live=live,
        )  # fmt: skip
        return gradient
