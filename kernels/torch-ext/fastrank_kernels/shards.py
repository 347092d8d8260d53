"""A head whose vocabulary is divided among processes, and what they exchange.

Every process holds some rows of the head, and all hidden rows and labels. For each chunk of rows it
makes its part of the logits, and three collectives do the rest, as in Megatron-LM
(arXiv:1909.08053, section 3): the maximum over processes of the parts' log-sum-exps [rows]; one sum
of the rescaled exponentials and of the labels' logits [2, rows]; and one sum of the hidden rows'
gradient [rows, D]. The head's gradient stays where its rows are. A sum over processes has the same
bits on each of them, and so has whatever follows from it: log-probabilities, the ranking, the
coefficients, and which rows are dead.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .planner import default_logits_memory


class VocabShard(NamedTuple):
    """The rows of a head that a process holds.

    As text in an operator's arguments, where a process group cannot go:

    >>> VocabShard("0", 3, 7, 4).encode()
    '3 7 4 0'
    >>> VocabShard.decode("3 7 4 0").total
    7
    """

    group: str
    """Name of the process group."""
    first: int
    """The vocabulary entry of the first row."""
    total: int
    """V, over all processes."""
    largest: int
    """Rows of the process that has most: all plan the same chunks, for that one."""

    def encode(self) -> str:
        return f"{self.first} {self.total} {self.largest} {self.group}"

    @classmethod
    def decode(cls, text: str) -> VocabShard:
        first, total, largest, group = text.split(" ", 3)
        return cls(group, int(first), int(total), int(largest))

    def merge(self, lse: Tensor, target: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Log-sum-exp and log-probability over the whole vocabulary, both [rows], from this
        process's `reference.row_stats`; ``labels`` are places in its part. Two collectives."""
        top = lse.clone()
        self._all_reduce(top, dist.ReduceOp.MAX)
        top.masked_fill_(top.isinf(), 0.0)
        pair = torch.stack((torch.exp(lse - top), target))
        self._all_reduce(pair, dist.ReduceOp.SUM)
        whole = pair[0].log_().add_(top)
        # Rounding can lift the label's logit above the log-sum-exp.
        logp = (pair[1] - whole).clamp_(max=0.0)
        known = (labels >= -self.first) & (labels < self.total - self.first)
        return whole, logp.masked_fill_(~known, float("nan"))

    def sum(self, values: Tensor) -> Tensor:
        """The sum over processes, in place. One collective."""
        self._all_reduce(values, dist.ReduceOp.SUM)
        return values

    def _all_reduce(self, values: Tensor, operation: Any) -> None:
        dist.all_reduce(values, operation, group=_group_of(self.group))


def agree_on_shard(
    group: dist.ProcessGroup, rows: int, logits_memory: int | None, device: torch.device
) -> tuple[VocabShard, int]:
    """The shard of a process that holds ``rows`` rows, in the order of the group's processes, and
    the least of their memories for logits.

    The first call with the same arguments is a collective of its own: the processes of a group call
    it alike.
    """
    memory = logits_memory or default_logits_memory(device.type, device.index)
    return _agree(group.group_name, rows, memory)


@cache
def _agree(group_name: str, rows: int, memory: int) -> tuple[VocabShard, int]:
    group = _group_of(group_name)
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, (rows, memory), group=group)
    sizes = [size for size, _ in found]
    first = sum(sizes[: dist.get_rank(group)])
    shard = VocabShard(group_name, first, sum(sizes), max(sizes))
    return shard, min(least for _, least in found)


def _group_of(name: str) -> dist.ProcessGroup:
    # What torch's own functional collectives do with the name that stands for a group.
    resolve: Any = dist.distributed_c10d._resolve_process_group
    group: dist.ProcessGroup = resolve(name)
    return group
