"""The earlier positions that a layer lets a token see.

Every mask of a causal attention layer in transformers is an interval that ends at the query:
everything (full), the last w positions (sliding), or the query's own chunk of c positions
(chunked). Written on *positions* it means the same in a pack as in a row of its own, which the same
mask written on packed indices does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

PositionT = TypeVar("PositionT", int, Tensor)


@dataclass(frozen=True)
class Visibility:
    """``kind`` of layer and its ``size`` in positions (0 for full attention)."""

    kind: Literal["full", "sliding", "chunked"] = "full"
    size: int = 0

    def first(self, position: PositionT) -> PositionT:
        """The first position that a query at ``position`` sees; of an int or an integer tensor."""
        if self.kind == "sliding":
            return (position - self.size + 1) * (position >= self.size)
        if self.kind == "chunked":
            return position - position % self.size
        return position * 0

    def covers(self, length: int) -> bool:
        """Whether a causal row of ``length`` tokens is not restricted at all."""
        return self.kind == "full" or length <= self.size

    def mask(self, query: Tensor, key: Tensor) -> Tensor:
        """bool, broadcast over the positions of queries and keys: True where the key is seen."""
        seen = key <= query
        return seen if self.kind == "full" else seen & (key >= self.first(query))

    def __str__(self) -> str:
        return self.kind if self.kind == "full" else f"{self.kind}({self.size})"


FULL = Visibility()


def ask(mask_function: Callable[..., Any], local_size: int | None, device: torch.device) -> Tensor:
    """A mask's answers on pairs of positions around every border of `recognise`'s candidates.

    The host is asked first, so that nothing waits for a device. The mask of Llama 4's chunked
    layers holds a tensor on the model's device, and only there it can be evaluated. A compiler
    traces one attempt only: that on ``device``.

    Args:
        mask_function: ``(batch, head, query, key)`` -> bool, transformers' definition of a mask on
            the indices of one row.
        local_size: the window or chunk that goes with it.
        device: where the mask's own tensors are.

    Returns:
        bool, on the host.

    Raises:
        ValueError: the mask cannot be evaluated on the positions of one row.
    """
    query, key = _borders(local_size)
    host = torch.device("cpu")
    compiling = torch.compiler.is_compiling()
    attempts = (device,) if compiling or device == host else (host, device)
    for place in attempts:
        zero = torch.zeros((), dtype=torch.long, device=place)
        try:
            asked: Tensor = mask_function(zero, zero, query.to(place), key.to(place)).cpu()
        except (IndexError, TypeError, RuntimeError) as error:
            failure = error
        else:
            return asked.expand(query.shape)
    raise ValueError(
        "attention mask must be causal, sliding or chunked on the positions of one row, got a "
        f"mask that cannot be evaluated there ({failure})"
    ) from failure


def recognise(answers: Tensor, local_size: int | None) -> Visibility:
    """The visibility whose mask gives the answers of `ask`.

    Raises:
        ValueError: none does; a mask of another shape (bidirectional, blockwise, user-made) is not
            taken for causal.
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
