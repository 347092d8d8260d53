"""Data parallelism: the rank and number of processes, and how gradients travel between them.

Engines that communicate inside forward and backward (DDP, FSDP2) wait until every process has come
to the same call. So all processes run equally many passes per step, gradients travel with the last
one only, and because the engines take the mean of gradients over processes, a sum is scaled by
their number. Processes that hold parts of one tensor-parallel model count as one: they run the same
packs (`fastrank.modeling.mesh`).
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
from torch.nn.parallel import DistributedDataParallel

from fastrank.errors import InputError
from fastrank.hf_private import set_sync_gradients
from fastrank.modeling.mesh import DataShare, data_share, is_sharded

if TYPE_CHECKING:
    from accelerate import Accelerator


class Engine:
    """Runs a plain model in one process; subclasses run a wrapped one in several.

    Attributes:
        rank: of this process among those that take different data.
        world_size: processes over which gradients are averaged; 1 for none.
        group: their process group; None for all processes.
        num_processes: of the run; a multiple of ``world_size`` in tensor parallelism.
    """

    rank: int = 0
    world_size: int = 1
    group: Any = None
    num_processes: int = 1

    def synchronising(self, model: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Context of one forward and backward pass; gradients travel with the last one of a
        step."""
        return nullcontext()

    def backward(self, total: Tensor) -> None:
        """Back-propagate a scalar."""
        total.backward()

    def gather(self, items: list[Any]) -> list[Any]:
        """The items of every process that takes other data, in their order, on every process."""
        return _gather(items, self.world_size, self.group)

    def gather_all(self, items: list[Any]) -> list[Any]:
        """The items of every process of the run, those that take the same data too."""
        whole = self.num_processes > self.world_size
        return _gather(items, self.num_processes, None if whole else self.group)

    def gather_count(self, count: int, device: torch.device) -> list[int]:
        """The ``count`` of every process that takes other data; faster than `gather`."""
        if self.world_size == 1:
            return [count]
        mine = torch.tensor([count], device=device)
        counts = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(counts, mine, group=self.group)
        return [int(found) for found in counts]

    def all_true(self, flag: Tensor) -> bool:
        """Whether a boolean scalar is true on every process of the run."""
        if self.num_processes > 1:
            flag = flag.to(torch.int32)
            whole = self.num_processes > self.world_size
            dist.all_reduce(flag, dist.ReduceOp.MIN, group=None if whole else self.group)
        return bool(flag)


def _gather(items: list[Any], num_processes: int, group: Any) -> list[Any]:
    if num_processes == 1:
        return items
    gathered: list[Any] = [None] * num_processes
    dist.all_gather_object(gathered, items, group=group)
    return [item for part in gathered for item in part]


class _DistributedEngine(Engine):
    def __init__(self, share: DataShare) -> None:
        self.rank, self.world_size, self.group = share
        self.num_processes = share.size


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
    """Runs a model as accelerate prepares it, DeepSpeed included, or as transformers has sharded
    it (``DistributedConfig``).

    Raises:
        InputError: the model or a sequence is divided in a way that packs cannot follow.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module) -> None:
        self.accelerator = accelerator
        self.num_processes = accelerator.num_processes
        self.rank, self.world_size, self.group = _accelerate_share(accelerator, model)
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


_LOADING = (
    "load the model with transformers' distributed_config=DistributedConfig(tp_size=..., "
    "fsdp_size=...), which shards it"
)


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


def _accelerate_share(accelerator: Accelerator, model: nn.Module) -> DataShare:
    """This process's share of the data for a model that accelerate will prepare."""
    plugin = accelerator.state.deepspeed_plugin
    settings = {} if plugin is None else plugin.deepspeed_config
    if settings.get("tensor_parallel", {}).get("autotp_size", 0) > 1:
        raise InputError("DeepSpeed's tensor_parallel is not supported, expected none; " + _LOADING)
    config = getattr(accelerator, "parallelism_config", None)
    for name in ("cp_size", "sp_size") if config is not None else ():
        if getattr(config, name, 1) > 1:
            raise InputError(
                f"parallelism_config: a pack cannot be divided along its sequence, expected "
                f"{name}=1, got {getattr(config, name)}"
            )
    if not is_sharded(model):
        if config is not None and config.tp_size > 1:
            raise InputError(
                f"parallelism_config has tp_size={config.tp_size}, but the model is whole; "
                + _LOADING
            )
        return DataShare(accelerator.process_index, accelerator.num_processes, None)
    if plugin is not None or accelerator.is_fsdp2:
        raise InputError(
            "FSDP or DeepSpeed of accelerate cannot shard a model that is sharded already; "
            + _LOADING
        )
    return data_share(model)


def engine_of(model: nn.Module) -> Engine:
    """The engine of a model as PyTorch wraps it: plain, DDP, or FSDP2.

    Tensor parallelism without FSDP2 has no part in the data: every process runs it as its own.
    """
    if isinstance(model, DistributedDataParallel):
        return DDPEngine(DataShare.of_group(model.process_group))
    if is_sharded(model):
        share = data_share(model)
        return FSDP2Engine(share) if share.size > 1 else Engine()
    return Engine()
