"""Data parallelism: the rank and number of processes, and how gradients travel between them.

Engines that communicate inside forward and backward (DDP, FSDP2) wait until every process has come
to the same call. So all processes run equally many passes per step, gradients travel with the last
one only, and because the engines take the mean of gradients over processes, a sum is scaled by
their number.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from fastrank.hf_private import set_sync_gradients

if TYPE_CHECKING:
    from accelerate import Accelerator


class Engine:
    """Runs a plain model in one process; subclasses run a wrapped one in several.

    Attributes:
        rank: of this process among those that share the data.
        world_size: processes over which gradients are averaged; 1 for none.
        group: their process group; None for all processes.
    """

    rank: int = 0
    world_size: int = 1
    group: Any = None

    def synchronising(self, model: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Context of one forward and backward pass; gradients travel with the last one of a
        step."""
        return nullcontext()

    def backward(self, total: Tensor) -> None:
        """Back-propagate a scalar."""
        total.backward()

    def gather(self, items: list[Any]) -> list[Any]:
        """Every process's items, in the order of processes, on every process."""
        if self.world_size == 1:
            return items
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, items, group=self.group)
        return [item for part in gathered for item in part]

    def gather_count(self, count: int, device: torch.device) -> list[int]:
        """The ``count`` of every process; faster than `gather`."""
        if self.world_size == 1:
            return [count]
        mine = torch.tensor([count], device=device)
        counts = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(counts, mine, group=self.group)
        return [int(found) for found in counts]

    def all_true(self, flag: Tensor) -> bool:
        """Whether a boolean scalar is true on every process."""
        if self.world_size > 1:
            flag = flag.to(torch.int32)
            dist.all_reduce(flag, dist.ReduceOp.MIN, group=self.group)
        return bool(flag)


class _DistributedEngine(Engine):
    def __init__(self, group: Any = None) -> None:
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)
        self.group = group


class DDPEngine(_DistributedEngine):
    """Runs a model that ``DistributedDataParallel`` wraps."""

    def synchronising(self, model: Any, last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if last else model.no_sync()


class FSDP2Engine(_DistributedEngine):
    """Runs a model that ``fully_shard`` has sharded."""

    @contextlib.contextmanager
    def synchronising(self, model: nn.Module, last: bool) -> Iterator[None]:
        # Without synchronisation FSDP2 keeps unsharded gradients and adds to them.
        switch: Any = getattr(model, "set_requires_gradient_sync", None)
        if switch is None:
            yield  # sharded below the root only: each unit reduces its gradients every time
            return
        switch(last)
        try:
            yield
        finally:
            switch(True)


class AccelerateEngine(Engine):
    """Runs a model as accelerate has prepared it, DeepSpeed included."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.rank = accelerator.process_index
        self.world_size = accelerator.num_processes
        if accelerator.is_fsdp2:
            _reduce_in_float32(accelerator.state.fsdp_plugin)
        if accelerator.distributed_type == "DEEPSPEED":
            _gather_when_saving(accelerator.state.deepspeed_plugin)

    def synchronising(self, model: nn.Module, last: bool) -> AbstractContextManager[Any]:
        set_sync_gradients(self.accelerator, last)
        return nullcontext() if last else self.accelerator.no_sync(model)

    def backward(self, total: Tensor) -> None:
        options = {}
        if self.accelerator.distributed_type == "DEEPSPEED":
            options["scale_wrt_gas"] = False  # the loss is normalised already
        self.accelerator.backward(total, **options)


def _reduce_in_float32(plugin: Any) -> None:
    """Add up the processes' gradients in float32: accelerate's mixed precision takes the dtype of
    the computation for that too."""
    policy = plugin.mixed_precision_policy
    if policy is not None and policy.param_dtype is not None:
        plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32)


def _gather_when_saving(plugin: Any) -> None:
    """Let ZeRO-3 save whole weights; by default it leaves a folder without any."""
    if plugin.zero_stage == 3:
        zero = plugin.hf_ds_config.config["zero_optimization"]
        zero["stage3_gather_16bit_weights_on_model_save"] = True


def engine_of(model: nn.Module) -> Engine:
    """The engine of a model as PyTorch wraps it: plain, DDP, or FSDP2 over all processes."""
    if isinstance(model, DistributedDataParallel):
        return DDPEngine(model.process_group)
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return FSDP2Engine()
    return Engine()
