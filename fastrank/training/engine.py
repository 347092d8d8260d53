"""Data parallelism: the rank and number of processes, and how gradients travel between them.

Engines that communicate inside forward and backward (DDP, FSDP2) wait until every process has come
to the same call. So all processes run equally many passes per step, and because the engines take
the mean of gradients over processes, a sum is scaled by their number. Processes that hold parts of
one tensor-parallel model count as one: they run the same packs (`fastrank.modeling.mesh`).

Gradients that every process holds whole travel with the last pass only. Sharded ones (FSDP2, ZeRO)
travel with each: kept until the last, they would take the memory of all weights on every process.
The output head, often the largest weight, is the exception: under FSDP2 it is gathered once per
step, and its gradient scattered once.
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
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from fastrank.errors import InputError
from fastrank.hf_private import set_sync_gradients
from fastrank.modeling.heads import head_module
from fastrank.modeling.mesh import DataShare, data_share, is_sharded
from fastrank.modeling.unwrap import causal_lm, unwrap

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

    def step(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Context of all passes of a step, those without gradients too."""
        return nullcontext()

    def synchronising(self, model: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Context of one forward and backward pass; the last one of a step completes its
        gradients."""
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

    def add_up(self, values: Tensor) -> None:
        """Replace a tensor, in place, by its sum over the processes that take other data."""
        if self.world_size > 1:
            dist.all_reduce(values, group=self.group)

    def least(self, values: Tensor) -> list[int]:
        """The least of each of some integers over all processes of the run."""
        if self.num_processes > 1:
            values = values.to(torch.int32)
            whole = self.num_processes > self.world_size
            dist.all_reduce(values, dist.ReduceOp.MIN, group=None if whole else self.group)
        return [int(value) for value in values.tolist()]


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

    def step(self, model: nn.Module) -> AbstractContextManager[Any]:
        return _keeping_head(model)

    def synchronising(self, model: nn.Module, last: bool) -> AbstractContextManager[Any]:
        _release_head(model, last)
        return nullcontext()


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
            _set_up_zero(accelerator.state.deepspeed_plugin)

    def step(self, model: nn.Module) -> AbstractContextManager[Any]:
        return _keeping_head(model)

    def synchronising(self, model: nn.Module, last: bool) -> AbstractContextManager[Any]:
        set_sync_gradients(self.accelerator, last)
        _release_head(model, last)
        whole = not (last or self.accelerator.is_fsdp2)
        return self.accelerator.no_sync(model) if whole else nullcontext()

    def backward(self, total: Tensor) -> None:
        options = {}
        if self.accelerator.distributed_type == "DEEPSPEED":
            options["scale_wrt_gas"] = False  # the loss is normalised already
        self.accelerator.backward(total, **options)


_LOADING = (
    "load the model with transformers' distributed_config=DistributedConfig(tp_size=..., "
    "fsdp_size=...), which shards it"
)


@contextlib.contextmanager
def _keeping_head(model: nn.Module) -> Iterator[None]:
    """Gather the unit of ``fully_shard`` that holds the output head once for all passes within."""
    unit = _head_unit(model)
    if unit is None:
        yield
        return
    # It stays so outside of steps, where an evaluation gathers the head once, too; what is gathered
    # when a step begins holds the weights as they are.
    unit.set_reshard_after_forward(False, recurse=False)
    _release_head(model, False)
    try:
        yield
    finally:
        _release_head(model, True)
        unit.reshard()  # the last backward pass has done it already, if there was one


def _release_head(model: nn.Module, release: bool) -> None:
    """Whether the next backward pass scatters the head's gradient, and lets its weight go."""
    unit = _head_unit(model)
    if unit is not None:
        unit.set_requires_gradient_sync(release, recurse=False)
        unit.set_reshard_after_backward(release, recurse=False)


def _head_unit(model: nn.Module) -> FSDPModule | None:
    """The unit of ``fully_shard`` that holds the output head; None if it is not sharded so."""
    head = head_module(causal_lm(unwrap(model)))
    name = next(name for name, module in model.named_modules() if module is head)
    parts = name.split(".")
    for length in range(len(parts), -1, -1):
        module = model.get_submodule(".".join(parts[:length]))
        if isinstance(module, FSDPModule):
            return module
    return None


def _reduce_in_float32(plugin: Any) -> None:
    """Add up the processes' gradients in float32: accelerate's mixed precision takes the dtype of
    the computation for that too."""
    policy = plugin.mixed_precision_policy
    if policy is not None and policy.param_dtype is not None:
        plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32)


def _set_up_zero(plugin: Any) -> None:
    """Add up gradients in float32, over packs and over processes, as far as the user's own
    configuration leaves it open; let ZeRO-3 save whole weights, instead of a folder without any."""
    settings = plugin.hf_ds_config.config
    settings.setdefault("communication_data_type", "fp32")
    settings.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    if plugin.zero_stage == 3:
        settings["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True


def all_processes() -> Engine:
    """All processes of the run, without a model."""
    return _DistributedEngine(DataShare.of_group()) if dist.is_initialized() else Engine()


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
