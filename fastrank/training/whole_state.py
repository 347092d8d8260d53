"""Weights and optimiser state of a sharded model, in the files that one process writes.

A run may then go on with another engine or another number of processes. The alternatives do less:
what accelerate and DeepSpeed write only they read, and a sharded checkpoint of torch needs a copy
of its own for ``from_pretrained``. The price: one process holds the whole of what it writes or
reads in the memory of its host.

Every process must call these functions. Only the first one reads files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from fastrank.errors import InputError


def whole_optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """``optimizer.state_dict()`` with whole tensors, on the CPU; empty but on the first process."""
    found = optimizer.state_dict()
    keep = dist.get_rank() == 0
    state: dict[int, dict[str, Any]] = {}
    for number, values in found["state"].items():
        gathered = {name: _whole(value) for name, value in values.items()}
        if keep:
            state[number] = {name: _on_cpu(value) for name, value in gathered.items()}
    return {"state": state, "param_groups": found["param_groups"]} if keep else {}


def load_optimizer_state(optimizer: torch.optim.Optimizer, file: Path) -> None:
    """Load what `whole_optimizer_state` gave, or an optimiser of a whole model.

    Raises:
        InputError: the state is of other parameters.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    read = None
    if dist.get_rank() == 0:
        read = torch.load(file, map_location="cpu", weights_only=True)
    groups, outlines = _from_first(
        None if read is None else (read["param_groups"], _outlines(read["state"]))
    )
    saved = sum(len(group["params"]) for group in groups)
    if saved != len(parameters):
        raise InputError(f"{file} must hold the state of {len(parameters)} parameters, got {saved}")
    state = {}
    for number, outline in outlines.items():
        parameter = parameters[number]
        values = {} if read is None else read["state"][number]
        state[number] = {
            name: _spread(values.get(name), parameter) if shape == tuple(parameter.shape) else small
            for name, (shape, small) in outline.items()
        }
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def load_weights(model: nn.Module, folder: Path) -> None:
    """Load a checkpoint's weights and persistent buffers into a model, sharded in any way. Buffers
    that the files do not have stay as they are: some models leave theirs out.

    Raises:
        InputError: a weight is missing, or something has another shape.
    """
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    with ExitStack() as stack:
        places = _places(stack, folder) if dist.get_rank() == 0 else {}
        shapes = _from_first(
            {name: tuple(place.get_slice(name).get_shape()) for name, place in places.items()}
            if dist.get_rank() == 0
            else None
        )
        loaded: set[Tensor] = set()
        for name, own in state.items():
            if name not in shapes or own in loaded:
                continue
            if shapes[name] != tuple(own.shape):
                raise InputError(
                    f"{folder}: {name} must have shape {tuple(own.shape)}, got {shapes[name]}"
                )
            value = places[name].get_tensor(name) if places else None
            with torch.no_grad():
                own.copy_(_spread(value, own))
            loaded.add(own)
    missing = [name for name, p in model.named_parameters() if p not in loaded]
    if missing:
        raise InputError(f"{folder} has no weights for {missing[0]} (of {len(state)} in the model)")


def _places(stack: ExitStack, folder: Path) -> dict[str, Any]:
    """The open file of each weight."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    files = [SAFE_WEIGHTS_NAME]
    if index.is_file():
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    elif not (folder / SAFE_WEIGHTS_NAME).is_file():
        files = []
    opened = [stack.enter_context(safe_open(folder / name, framework="pt")) for name in files]
    return {name: file for file in opened for name in file.keys()}  # noqa: SIM118


def _outlines(state: Mapping[int, Mapping[str, Any]]) -> dict[int, dict[str, Any]]:
    """Of each value its shape, and the value itself if it is no tensor or a scalar."""
    return {
        number: {
            name: (tuple(value.shape), value if value.dim() == 0 else None)
            if isinstance(value, Tensor)
            else (None, value)
            for name, value in values.items()
        }
        for number, values in state.items()
    }


def _spread(value: Tensor | None, like: Tensor) -> Tensor:
    """A tensor of the first process (None on the others), sharded as another one is."""
    device = like.to_local().device if isinstance(like, DTensor) else like.device
    whole = torch.empty(like.shape, dtype=like.dtype, device=device)
    if value is not None:
        whole.copy_(value)
    dist.broadcast(whole, src=0)
    if isinstance(like, DTensor):  # every process cuts out its own part
        return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
    return whole


def _whole(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _on_cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value


def _from_first(value: Any) -> Any:
    holder = [value]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]
