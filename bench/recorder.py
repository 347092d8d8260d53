"""What a run asks of a GPU, recorded without one.

`Recorder` counts launches, bytes and waits: of operations as torch dispatches them (on fake CUDA
tensors, or on the ``meta`` device, which stands for a GPU), and of kernels of our own where they
would be launched. A tensor's bytes count once for every operation or kernel that is given it, also
where a chip's cache would serve it again.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastrank_kernels.launch import Launch

# What a kernel writes; it reads everything else, each row of `logits` and `out` that has a program.
WRITTEN = {
    "row_stats_kernel": ("lse", "logp"),
    "dlogits_kernel": ("out",),
    "unit_dlogits_kernel": ("out", "logp", "factor"),
    "rank_kernel": ("scores", "rank_loss", "sft_loss", "coefficients"),
    "rescale_kernel": (),
    "segment_sum_kernel": ("sums",),
}
PRODUCTS = ("mm", "addmm", "addmm_")
WAITS = ("_local_scalar_dense", "nonzero", "item", "equal", "is_nonzero")


@dataclass
class Counts:
    """The counts of one call."""

    workload: str
    way: str
    strategy: str = ""
    chunks: int = 0
    products: int = 0
    kernels: int = 0
    operations: int = 0
    """Launches that are neither a kernel of ours nor a product."""
    read: float = 0.0
    written: float = 0.0
    products_read: float = 0.0
    products_written: float = 0.0
    waits: int = 0
    uploads: int = 0
    names: list[str] = field(default_factory=list)
    moved: Counter[str] = field(default_factory=Counter)
    """Bytes read and written by each kernel of ours."""


def on_gpu(tensor: Tensor) -> bool:
    return tensor.device.type in ("cuda", "meta")


def size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class Recorder(TorchDispatchMode):
    """Counts what would run on the device: operations as torch dispatches them, and kernels."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def launch(self, launch: Launch, device: torch.device) -> None:
        """In place of `launch.run`."""
        counts, name = self.counts, launch.kernel.fn.__name__
        counts.kernels += 1
        counts.names.append(name)
        before = counts.read + counts.written
        for argument, value in launch.arguments.items():
            if not isinstance(value, Tensor):
                continue
            moved = size(value)
            if argument in ("logits", "out"):
                moved = launch.grid[0] * value.shape[1] * value.element_size()
            if name == "rescale_kernel" and argument == "values":
                moved = 0  # a factor of 1: no program looks at them
            if argument in WRITTEN[name]:
                counts.written += moved
            else:
                counts.read += moved
        counts.moved[name] += int(counts.read + counts.written - before)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        results = result if isinstance(result, (tuple, list)) else [result]
        made = [x for x in results if isinstance(x, Tensor)]
        name = function.name().split("::")[1].split(".")[0]
        on_device = any(on_gpu(x) for x in (*given, *made))
        new_memory = name.startswith(("empty", "new_empty", "detach", "device"))
        if not on_device or function.is_view or new_memory or name == "_unsafe_view":
            return result
        counts = self.counts
        if name in WAITS or any(on_gpu(x) for x in given) and any(not on_gpu(x) for x in made):
            counts.waits += 1
        if any(not on_gpu(x) and x.dim() for x in given):
            counts.uploads += 1
            waits_not = (kwargs or {}).get("non_blocking") or (name == "copy_" and True in args[2:])
            counts.waits += not waits_not
        out = [x for x in made if on_gpu(x)]
        written, read = sum(map(size, out)), sum(size(x) for x in given if on_gpu(x))
        if name == "copy_" or (kwargs or {}).get("out") is not None:
            read -= written  # what stood there is not looked at
        if name in PRODUCTS:
            counts.products += 1
            counts.products_read += read
            counts.products_written += written
        else:
            counts.operations += 1
            counts.names.append(name)
            counts.read += read
            counts.written += written
        return result
