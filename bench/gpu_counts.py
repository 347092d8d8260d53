"""What the fused losses, shared-prompt attention and a step cost on a GPU, by count, without one.

    python -m bench.gpu_counts [--csv FILE]

The drivers themselves run, on fake CUDA tensors of the workloads' sizes (K1 to K4 here; A1 and the
model of S1 in `bench.model_counts`): kernels are recorded where they would be launched, with their
arguments, and every other operation where torch would dispatch it. So the numbers follow the code:
another pass over the logits, a copy or a wait is seen at once, and
``tests/benchmarks/test_gpu_counts.py`` holds them.

Counted are forward and backward with an upstream factor of 1. ``read`` and ``written`` are bytes
per logit (T × V), for attention and models per element of a hidden state (N × D), by everything but
the matrix products, which are listed by themselves. ``waits`` are operations whose result the host
needs and blocking copies, ``uploads`` copies from the host.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastrank
from bench.model_counts import count_attention, count_model
from bench.recorder import Counts, Recorder
from fastrank.benchmarks.workloads import MODEL_SHAPES, WORKLOADS, Workload
from fastrank_kernels import (
    compact,
    dlogits,
    linear,
    rank,
    rescale,
    reuse_head_cast,
    row_stats,
    unit_dlogits,
)
from fastrank_kernels.linear import Ranking
from fastrank_kernels.planner import plan_logprobs, plan_ranking
from fastrank_kernels.projection import Projection

H100_MEMORY = 85_017_755_648
WAYS = ("one pass", "two passes", "log-probabilities")
# The packs of a step after its first, which find the head cast.
NEXT_PACK = "one pass, next pack"


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
    with FakeTensorMode(), reuse_head_cast():
        call, ranking = inputs(workload)
        if way == NEXT_PACK:
            call.cast()  # by the pack before
        tokens, vocab = workload.tokens, workload.vocab
        groups = [workload.candidates * i for i in range(workload.groups + 1)]
        sizes: dict[str, Any] = {
            "rows": tokens, "vocab": vocab, "logits_itemsize": call.logits_dtype.itemsize,
            "hidden_grad": call.need_hidden, "head_grad": call.need_head,
            "budget": H100_MEMORY // 8, "device_type": "cuda",
        }  # fmt: skip
        factor = torch.empty((), device="cuda")
        leaves = (call.hidden, call.weight)
        with recording(counts, way):
            call = call.cast()
            if way == "log-probabilities":
                plan = plan_logprobs(**sizes)
                done = linear.forward(call, plan)
                linear.backward(call, plan, done, done.logp, drop_dead_rows=False)
            else:
                rows_per_group = workload.candidates * workload.response
                plan = plan_ranking(largest_group=rows_per_group, **sizes)
                starts = [workload.response * i for i in groups]
                _, _, gradients = linear.rank(call, ranking, plan, groups, starts)
                for gradient, leaf in zip(gradients[:2], leaves, strict=True):
                    if gradient is not None:
                        call.module.rescale_(gradient, factor).to(leaf.dtype)
    counts.strategy = plan.strategy
    counts.chunks = math.ceil(tokens / plan.chunk_rows)
    for name in ("read", "written", "products_read", "products_written"):
        setattr(counts, name, round(getattr(counts, name) / (tokens * vocab), 3))
    return counts


def inputs(workload: Workload) -> tuple[Projection, Ranking]:
    """A workload's tensors, without memory. No row is dropped: at the workloads' accuracy of 0
    every one is live."""
    dtype = getattr(torch, workload.dtype)
    head = torch.float32 if workload.autocast else dtype
    candidates = workload.groups * workload.candidates
    call = Projection(
        torch.empty(workload.tokens, workload.hidden, dtype=dtype, device="cuda"),
        torch.empty(workload.vocab, workload.hidden, dtype=head, device="cuda"),
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


def head_of(workload: Workload) -> Workload:
    """A step's loss over its model's head, as a workload of the loss suite."""
    shape = MODEL_SHAPES[workload.model]
    return replace(workload, suite="loss", model="", vocab=shape.vocab, hidden=shape.hidden)


def kernel_bytes(workload: Workload) -> dict[str, int]:
    """Bytes that each kernel of ours reads and writes in one run of fastrank's variant."""
    if workload.suite == "step":
        workload = head_of(workload)
    return dict(count(workload, "one pass").moved) if workload.suite == "loss" else {}


def all_counts() -> list[Counts]:
    """K1 to K4 by every way to their gradients, K1 with a float32 head, A1, and S1: its
    model, and its loss."""
    gpu = [w for w in WORKLOADS.values() if "cuda" in w.devices]
    plain = [w for w in gpu if w.suite == "loss" and not (w.autocast or w.softcap or w.accuracy)]
    rows = [count(w, way) for w in plain for way in WAYS]
    rows += [count(w, way) for w in gpu if w.autocast for way in (WAYS[0], NEXT_PACK)]
    rows += [count_attention(w) for w in gpu if w.suite == "attention"]
    for w in gpu:
        if w.suite == "step":
            rows += [count_model(w), count(head_of(w), "one pass")]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--csv", help="also write the table here")
    options = parser.parse_args()
    rows = [asdict(counts) for counts in all_counts()]
    for row in rows:
        row.pop("names"), row.pop("moved")
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
