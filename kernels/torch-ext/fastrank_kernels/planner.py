"""The choice of strategy: from sizes, the gradients that are needed, and a memory budget.

A plan is a pure function of its arguments: the same call is planned the same way on every run of a
machine, because another order of chunks would be another order of sums. For that reason the default
budget is a share of the device's *total* memory, not of the memory that happens to be free.
"""

from __future__ import annotations

import os
from functools import cache
from typing import NamedTuple

import torch

# On a CPU a chunk of this many rows keeps the products at full speed; more only costs memory.
CPU_CHUNK_ROWS = 512
# A GPU's memory holds the logits of larger models' steps beside little else; 128 k entries for
# 16 k tokens should not need a second chunk.
_TOTAL_MEMORY_SHARE = {"cuda": 8}
# A pitch of 64 elements begins each row on a 128-byte line even in 2-byte elements.
_PITCH_STEP = 64

STRATEGIES = ("forward", "group", "keep", "recompute", "unit")


class Plan(NamedTuple):
    """How one call of a fused loss is computed."""

    strategy: str
    """``forward`` (no gradient), ``group``, ``keep``, ``recompute`` or ``unit``."""
    chunk_rows: int
    """Rows of logits that exist at once, at most (``group``: unless one group is larger)."""
    products: int
    """Matrix products of the size of the logits, forward and backward together."""
    reason: str
    """Why, in one line."""


def row_pitch(width: int) -> int:
    """Elements from one row of logits to the next: ``width`` rounded up so that rows are aligned,
    for the vendor's matrix products as for vectorised loads, whatever divides the vocabulary.

    >>> row_pitch(128256), row_pitch(50257)
    (128256, 50304)
    """
    return -(-width // _PITCH_STEP) * _PITCH_STEP


@cache
def default_logits_memory(device_type: str, index: int | None) -> int:
    """Bytes of logits that may exist at once on a device, when the caller names no budget:
    an eighth of a GPU's total memory, a sixteenth of a host's."""
    if device_type == "cuda":
        total = torch.cuda.get_device_properties(index or 0).total_memory
    else:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return total // _TOTAL_MEMORY_SHARE.get(device_type, 16)


def plan_ranking(
    *,
    rows: int,
    largest_group: int,
    vocab: int,
    logits_itemsize: int,
    hidden_grad: bool,
    head_grad: bool,
    budget: int,
    device_type: str,
) -> Plan:
    """Plan `linear_ranking`: ``rows`` response tokens, the largest group having ``largest_group``.

    ``budget`` is in bytes of logits; ``hidden_grad`` and ``head_grad`` (weight or bias) tell which
    gradients are needed.
    """
    limit = _rows_within(budget, vocab, logits_itemsize)
    chunk = _chunk_rows(rows, limit, device_type, logits_itemsize)
    if not (hidden_grad or head_grad):
        return Plan("forward", chunk, 1, "nothing needs a gradient")
    backward = int(hidden_grad) + int(head_grad)
    if largest_group <= limit:
        return Plan(
            "group", chunk, 1 + backward, f"whole groups fit {limit} rows of logits at once"
        )
    why = f"the largest group has {largest_group} rows, {limit} rows of logits fit"
    if not head_grad:
        return Plan("unit", chunk, 2, f"{why}; the head is frozen")
    return Plan("recompute", chunk, 2 + backward, why)


def plan_logprobs(
    *,
    rows: int,
    vocab: int,
    logits_itemsize: int,
    hidden_grad: bool,
    head_grad: bool,
    budget: int,
    device_type: str,
) -> Plan:
    """Plan `linear_logprobs`, whose upstream gradients are only known in the backward."""
    limit = _rows_within(budget, vocab, logits_itemsize)
    chunk = _chunk_rows(rows, limit, device_type, logits_itemsize)
    if not (hidden_grad or head_grad):
        return Plan("forward", chunk, 1, "nothing needs a gradient")
    if not head_grad:
        return Plan(
            "unit", chunk, 2, "the head is frozen: each row's gradient is known but for a factor"
        )
    backward = int(hidden_grad) + 1
    if rows <= limit:
        return Plan("keep", chunk, 1 + backward, f"all {rows} rows of logits fit the budget")
    return Plan(
        "recompute", chunk, 2 + backward, f"{limit} of {rows} rows of logits fit the budget"
    )


def group_chunks(token_offsets: list[int], chunk_rows: int) -> list[tuple[int, int]]:
    """Cut groups into runs ``(first, last + 1)`` of at most ``chunk_rows`` rows; a larger group is
    a run of its own. ``token_offsets`` [G + 1] are the groups' first tokens.

    >>> group_chunks([0, 4, 8, 20, 21], 8)
    [(0, 2), (2, 3), (3, 4)]
    """
    chunks: list[tuple[int, int]] = []
    first = 0
    for group in range(1, len(token_offsets)):
        if group - first > 1 and token_offsets[group] - token_offsets[first] > chunk_rows:
            chunks.append((first, group - 1))
            first = group - 1
    if len(token_offsets) > 1:
        chunks.append((first, len(token_offsets) - 1))
    return chunks


def _rows_within(budget: int, vocab: int, itemsize: int) -> int:
    return max(1, budget // max(1, row_pitch(vocab) * itemsize))


def _chunk_rows(rows: int, limit: int, device_type: str, itemsize: int) -> int:
    preferred = rows if device_type == "cuda" or itemsize < 4 else CPU_CHUNK_ROWS
    return max(1, min(rows, preferred, limit))
