"""Which earlier positions a layer lets a token see.

Every mask of a causal attention layer in transformers is an interval that ends at the query:
everything (full), the last w positions (sliding), or the query's own chunk of c positions
(chunked). Written on *positions* it means the same in a pack as in a row of its own, which the same
mask written on packed indices does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Visibility:
    """``kind`` of layer and its ``size`` in positions (0 for full attention)."""

    kind: Literal["full", "sliding", "chunked"] = "full"
    size: int = 0

    def first(self, position: int) -> int:
        """The first position that a query at ``position`` sees."""
        if self.kind == "sliding":
            return max(0, position - self.size + 1)
        if self.kind == "chunked":
            return position - position % self.size
        return 0

    def covers(self, length: int) -> bool:
        """Whether a causal row of ``length`` tokens is not restricted at all."""
        return self.kind == "full" or length <= self.size

    def mask(self, query: Tensor, key: Tensor) -> Tensor:
        """bool, broadcast over the positions of queries and keys: True where the key is seen."""
        seen = key <= query
        if self.kind == "sliding":
            return seen & (key > query - self.size)
        if self.kind == "chunked":
            return seen & (key // self.size == query // self.size)
        return seen

    def __str__(self) -> str:
        return self.kind if self.kind == "full" else f"{self.kind}({self.size})"


FULL = Visibility()


def classify(
    mask_function: Callable[..., Any], local_size: int | None, device: torch.device
) -> Visibility:
    """Recognise the mask that transformers asks for.

    ``mask_function(batch, head, query, key)`` is transformers' definition of the mask on the
    indices of one row and ``local_size`` the window or chunk that goes with it. The candidates are
    compared with it on positions around every border that they have, so that a mask of another
    shape (bidirectional, blockwise, user-made) raises ValueError and is not taken for causal.
    """
    return recognise(ask(mask_function, local_size, device), local_size)


def ask(mask_function: Callable[..., Any], local_size: int | None, device: torch.device) -> Tensor:
    """The mask's answers on pairs of positions around every border, bool on the host.

    Tensor operations only: a compiler can trace them.
    """
    query, key = _borders(local_size)
    zero = torch.zeros((), dtype=torch.long, device=device)
    try:
        asked: Tensor = mask_function(zero, zero, query.to(device), key.to(device)).cpu()
    except (IndexError, TypeError, RuntimeError) as error:
        raise ValueError(
            "attention mask must be causal, sliding or chunked on the positions of one row, got a "
            f"mask that cannot be evaluated there ({error})"
        ) from error
    return asked.expand(query.shape)


def recognise(answers: Tensor, local_size: int | None) -> Visibility:
    """The visibility whose mask gives these answers.

    Raises:
        ValueError: none does.
    """
    query, key = _borders(local_size)
    candidates = (
        (FULL,)
        if local_size is None
        else (Visibility("sliding", local_size), Visibility("chunked", local_size))
    )
    for candidate in candidates:
        if torch.equal(answers, candidate.mask(query, key)):
            return candidate
    raise ValueError(
        "attention mask must be causal, sliding or chunked on the positions of one row, got "
        "another pattern"
    )


def _borders(local_size: int | None) -> tuple[Tensor, Tensor]:
    size = local_size or 8
    border = sorted({0, 1, 2, size - 1, size, size + 1, 2 * size - 1, 2 * size, 3 * size + 1})
    query, key = torch.meshgrid(*[torch.tensor(border)] * 2, indexing="ij")
    return query.reshape(-1), key.reshape(-1)
