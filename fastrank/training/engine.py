"""What training in two phases needs to know of the processes that share a model.

Engines that communicate inside forward and backward (DDP, FSDP2) wait until every process has come
to the same call. So all processes run equally many passes, gradients travel with the last one
only, and because the engines take the mean of gradients over processes, a sum is scaled by their
number.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from fastrank.data.packing import Pack

Synchronising = Callable[[bool], contextlib.AbstractContextManager[Any]]


def _nothing(_: object) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


@dataclass(frozen=True)
class Engine:
    """How a model is run.

    Attributes:
        world_size: processes over which gradients are averaged; 1 for none.
        synchronising: gives the context of one forward and backward pass, told whether it is the
            last one, with which gradients travel.
        backward: back-propagates a scalar.
        computing: gives the context of each pass over a pack, in either phase.
    """

    world_size: int = 1
    synchronising: Synchronising = _nothing
    backward: Callable[[Tensor], Any] = torch.Tensor.backward
    computing: Callable[[Pack], contextlib.AbstractContextManager[Any]] = _nothing

    def everyone(self, count: int, device: torch.device) -> list[int]:
        """The ``count`` of every process; all of them must call it."""
        if self.world_size == 1:
            return [count]
        mine = torch.tensor([count], device=device)
        all_counts = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(all_counts, mine)
        return [int(found) for found in all_counts]


def engine_of(model: nn.Module) -> Engine:
    """The engine of a model as PyTorch wraps it: plain, DDP, or FSDP2 (``fully_shard``), over all
    processes."""
    if isinstance(model, DistributedDataParallel):
        return Engine(
            world_size=dist.get_world_size(model.process_group),
            synchronising=lambda last: contextlib.nullcontext() if last else model.no_sync(),
        )
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return Engine(
            world_size=dist.get_world_size(), synchronising=lambda last: _fsdp_sync(model, last)
        )
    return Engine()


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DDP (DeepSpeed's engine names it alike) and ``torch.compile``."""
    for name in ("module", "_orig_mod"):
        inner = getattr(model, name, None)
        if isinstance(inner, nn.Module):
            return unwrap(inner)
    return model


@contextlib.contextmanager
def _fsdp_sync(model: nn.Module, last: bool) -> Iterator[None]:
    """Without synchronisation FSDP2 keeps unsharded gradients and adds to them."""
    switch: Any = getattr(model, "set_requires_gradient_sync", None)
    if switch is None:
        yield  # sharded below the root only: each unit reduces its gradients every time
        return
    switch(last)
    try:
        yield
    finally:
        switch(True)
