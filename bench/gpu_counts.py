"""What a call of the fused losses costs on a GPU, by count and without one.

    python bench/gpu_counts.py [--csv FILE]

The drivers themselves run, on fake CUDA tensors of the workloads' sizes (K1 to K4 of the loss
suite): kernels are recorded where they would be launched, with their arguments, and every other
operation where torch would dispatch it. So the numbers follow the code: another pass over the
logits, a copy or a wait is seen at once, and ``tests/benchmarks/test_gpu_counts.py`` holds them.

Counted are forward and backward with an upstream factor of 1. ``read`` and ``written`` are bytes
per logit (T × V) by everything but the matrix products, which are listed by themselves. ``waits``
are operations whose result the host needs, ``uploads`` copies from the host.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastrank
from fastrank.benchmarks.workloads import WORKLOADS, Workload
from fastrank_kernels import compact, dlogits, linear, rank, rescale, row_stats, unit_dlogits
from fastrank_kernels.launch import Launch
from fastrank_kernels.linear import Ranking
from fastrank_kernels.planner import plan_logprobs, plan_ranking
from fastrank_kernels.projection import Projection

H100_MEMORY = 85_017_755_648
WAYS = ("one pass", "two passes", "log-probabilities")
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

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        given = [x for x in (*args, *(kwargs or {}).values()) if isinstance(x, Tensor)]
        results = result if isinstance(result, (tuple, list)) else [result]
        made = [x for x in results if isinstance(x, Tensor)]
        name = function.name().split("::")[1].split(".")[0]
        on_device = any(x.is_cuda for x in (*given, *made))
        new_memory = name.startswith(("empty", "new_empty", "detach", "device"))
        if not on_device or function.is_view or new_memory or name == "_unsafe_view":
            return result
        counts = self.counts
        if name in WAITS or any(x.is_cuda for x in given) and any(not x.is_cuda for x in made):
            counts.waits += 1
        if any(not x.is_cuda and x.dim() for x in given):
            counts.uploads += 1
        out = [x for x in made if x.is_cuda]
        written, read = sum(map(size, out)), sum(size(x) for x in given if x.is_cuda)
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


def get_item(tensor: Tensor, index: Any) -> Tensor:
    """`Tensor.__getitem__` without the look at the device that a torch without CUDA refuses."""
    for dim, part in enumerate(index if isinstance(index, tuple) else (index,)):
        if part is None:
            tensor = tensor.unsqueeze(dim)
        elif isinstance(part, slice):
            start, stop, _ = part.indices(tensor.shape[dim])
            tensor = torch.narrow(tensor, dim, start, max(0, stop - start))
        else:
            tensor = torch.select(tensor, dim, part)
    return tensor


def set_item(tensor: Tensor, index: Any, value: Any) -> None:
    torch.ops.aten.copy_.default(get_item(tensor, index), value)


@contextmanager
def recording(counts: Counts, way: str) -> Iterator[None]:
    """Fake tensors; kernels are recorded instead of launched."""
    recorder = Recorder(counts)
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # a fake tensor's address is 0, which is as good as any
        for module in (compact, dlogits, rank, rescale, row_stats, unit_dlogits):
            stack.enter_context(mock.patch.object(module, "run", recorder.launch))
        if not torch.backends.cuda.is_built():
            stack.enter_context(mock.patch.object(Tensor, "__getitem__", get_item))
            stack.enter_context(mock.patch.object(Tensor, "__setitem__", set_item))
        if way == "two passes":
            stack.enter_context(mock.patch.object(Projection, "one_pass", False))
        stack.enter_context(recorder)
        yield


def count(workload: Workload, way: str) -> Counts:
    """Counts of one call, forward and backward."""
    counts = Counts(workload.name, way)
    with FakeTensorMode():
        call, ranking = inputs(workload)
        tokens, vocab = workload.tokens, workload.vocab
        groups = [workload.candidates * i for i in range(workload.groups + 1)]
        sizes: dict[str, Any] = {
            "rows": tokens, "vocab": vocab, "logits_itemsize": call.logits_dtype.itemsize,
            "hidden_grad": call.need_hidden, "head_grad": call.need_head,
            "budget": H100_MEMORY // 8, "device_type": "cuda",
        }  # fmt: skip
        factor = torch.empty((), device="cuda")
        with recording(counts, way):
            if way == "log-probabilities":
                plan = plan_logprobs(**sizes)
                done = linear.forward(call, plan)
                linear.backward(call, plan, done, done.logp, drop_dead_rows=False)
            else:
                rows_per_group = workload.candidates * workload.response
                plan = plan_ranking(largest_group=rows_per_group, **sizes)
                starts = [workload.response * i for i in groups]
                _, _, gradients = linear.rank(call, ranking, plan, groups, starts)
                for gradient in gradients:
                    if gradient is not None:
                        call.module.rescale_(gradient, factor)
    counts.strategy = plan.strategy
    counts.chunks = math.ceil(tokens / plan.chunk_rows)
    for name in ("read", "written", "products_read", "products_written"):
        setattr(counts, name, round(getattr(counts, name) / (tokens * vocab), 3))
    return counts


def inputs(workload: Workload) -> tuple[Projection, Ranking]:
    """A workload's tensors, without memory. No row is dropped: at the workloads' accuracy of 0
    every one is live."""
    dtype = getattr(torch, workload.dtype)
    candidates = workload.groups * workload.candidates
    call = Projection(
        torch.empty(workload.tokens, workload.hidden, dtype=dtype, device="cuda"),
        torch.empty(workload.vocab, workload.hidden, dtype=dtype, device="cuda"),
        torch.empty(workload.tokens, dtype=torch.int64, device="cuda"),
        needs=(True, not workload.frozen_head, False),
    )
    ranking = Ranking(
        rewards=torch.empty(candidates, device="cuda"),
        cu_responses=torch.empty(candidates + 1, dtype=torch.int32, device="cuda"),
        cu_groups=torch.empty(workload.groups + 1, dtype=torch.int32, device="cuda"),
        reference_scores=None,
        spec=fastrank.loss_from_name(workload.loss).spec(),
        scale=1 / workload.groups,
        drop_dead_rows=False,
    )
    return call, ranking


def all_counts() -> list[Counts]:
    workloads = [w for w in WORKLOADS.values() if w.suite == "loss" and "cuda" in w.devices]
    return [count(w, way) for w in workloads for way in WAYS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--csv", help="also write the table here")
    options = parser.parse_args()
    rows = [asdict(counts) for counts in all_counts()]
    for row in rows:
        row.pop("names")
    print("| " + " | ".join(rows[0]) + " |\n|" + " --- |" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(map(str, row.values())) + " |")
    if options.csv:
        with open(options.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(main())
