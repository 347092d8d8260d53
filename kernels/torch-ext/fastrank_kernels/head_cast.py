"""The head in the dtype of the products, made once for several calls over the same weights.

Under autocast a float32 head is cast before its products, at 6 bytes moved per weight: 3.2 GB for
128 k entries of 4096. Only the caller knows for how long the weights stay as they are. A tensor's
version counter does not tell: optimisers that write through ``.data`` and engines that gather
shards into a parameter leave it where it was. A copy is therefore kept only inside
`reuse_head_cast`, in the thread that entered it; the counter is looked at besides.

The price is the copy's memory for as long.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class _Copy(NamedTuple):
    version: int
    """Of the weights when the copy was made."""
    tensor: Tensor


class _Kept(threading.local):
    def __init__(self) -> None:
        self.depth = 0
        self.copies = WeakTensorKeyDictionary()


_kept = _Kept()


@contextmanager
def reuse_head_cast(enabled: bool = True) -> Iterator[None]:
    """Let the calls within share one copy of a head that is cast for its products.

    For the packs of one optimiser step: the weights must not change in any other way than by
    operations on the tensor itself, which are noticed. Copies are freed at the end of the outermost
    such context, and no later than their head. Without ``enabled`` nothing is kept.

    >>> head = torch.ones(3, 2)
    >>> with reuse_head_cast():
    ...     cast_head(head, torch.bfloat16) is cast_head(head, torch.bfloat16)
    True
    """
    _kept.depth += enabled
    try:
        yield
    finally:
        _kept.depth -= enabled
        if not _kept.depth:
            _kept.copies.clear()


def cast_head(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight`` in ``dtype``, detached where it is a copy; a kept one inside
    `reuse_head_cast`."""
    if weight.dtype == dtype:
        return weight
    # A compiler would bake the state of this moment into its graph; an inference tensor counts no
    # versions, and could not be saved for a later backward.
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or weight.is_inference():
        return weight.to(dtype)
    if not _kept.depth:
        return weight.to(dtype)
    kept: _Copy | None = _kept.copies.get(weight)
    if kept is None or kept.version != weight._version or kept.tensor.dtype != dtype:
        kept = _Copy(weight._version, weight.detach().to(dtype))
        _kept.copies[weight] = kept
    return kept.tensor
