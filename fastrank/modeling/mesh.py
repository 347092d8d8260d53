"""Which processes share a model, and which share the data.

Processes that hold parts of one model (tensor parallelism) must see the same data; only replicas of
the model, sharded by FSDP or not, take different data. So whoever deals data asks `data_share`, and
never the global rank.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from fastrank.errors import InputError
from fastrank.hf_private import fsdp_mesh


class DataShare(NamedTuple):
    """A process's place among those that take different data.

    Example:
        >>> DataShare.of_mesh(None)
        DataShare(rank=0, size=1, group=None)
    """

    rank: int
    size: int
    group: Any
    """Their process group; None for all processes."""

    @staticmethod
    def of_group(group: Any = None) -> DataShare:
        """All processes of a group take different data."""
        return DataShare(dist.get_rank(group), dist.get_world_size(group), group)

    @staticmethod
    def of_mesh(mesh: DeviceMesh | None) -> DataShare:
        """All processes of a mesh take different data; None for a mesh of this process alone.
        Where it has several dimensions every process of the run must call it."""
        if mesh is None or mesh.size() == 1:
            return DataShare(0, 1, None)
        if mesh.size() == dist.get_world_size():
            return DataShare.of_group()
        return DataShare.of_group((mesh if mesh.ndim == 1 else mesh._flatten()).get_group())


def data_share(model: nn.Module) -> DataShare:
    """This process's share of the data for a model, by how the model is sharded.

    A model that ``fully_shard`` has sharded, with tensor parallelism or without, takes different
    data on each process of FSDP's mesh. All processes of one that is only sharded in tensor
    parallelism take the same. A whole model takes different data on every process of the run.
    """
    meshes = (fsdp_mesh(module) for module in model.modules() if isinstance(module, FSDPModule))
    mesh = next((mesh for mesh in meshes if mesh is not None), None)
    if mesh is not None:
        return DataShare.of_mesh(mesh)
    if is_sharded(model) or not (dist.is_available() and dist.is_initialized()):
        return DataShare.of_mesh(None)
    return DataShare.of_group()


def is_sharded(model: nn.Module) -> bool:
    """Whether a process holds only a part of the model."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def check_placement(model: nn.Module) -> None:
    """Refuse a model whose layers run on different devices, of one process or of several.

    Raises:
        InputError: naming the devices, or the stages.
    """
    stages = getattr(getattr(model.config, "distributed_config", None), "pp_size", None) or 1
    if stages > 1:
        raise InputError(
            f"{type(model).__name__} is cut into {stages} pipeline stages, which take no packs; "
            "expected pp_size=1 in its distributed_config"
        )
    placed = getattr(model, "hf_device_map", None) or {}
    devices = sorted({f"cuda:{d}" if isinstance(d, int) else str(d) for d in placed.values()})
    if len(devices) > 1:
        raise InputError(
            f"{type(model).__name__} is spread over {', '.join(devices)} by its device_map, which "
            "takes no packs; load it without device_map, or sharded by FSDP or tensor parallelism"
        )
