"""What shared-prompt attention and a model around it ask of a GPU, on the ``meta`` device.

A meta tensor has no values, so whatever needs one on the host fails: a run that ends has waited for
none. The backends for CUDA serve ``meta`` here, whose flash operators are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch import Tensor

import fastrank
from bench.recorder import Counts, Recorder
from fastrank.attention import backends
from fastrank.attention.segments import SegmentTable
from fastrank.attention.visibility import FULL
from fastrank.benchmarks.step_suite import random_model
from fastrank.benchmarks.workloads import Workload
from fastrank.data.packing import Group
from fastrank.modeling.prepare import _pack_hidden, prepared_state

META = torch.device("meta")


@contextmanager
def meta_is_a_gpu() -> Iterator[None]:
    """Backends for CUDA serve ``meta``."""
    with ExitStack() as stack:
        for owner, name, stand_in in (
            (backends.Backend, "runs_on", lambda self, device: self.device != "cpu"),
            (backends, "device_fault", lambda *_: None),
            (torch, "is_autocast_enabled", lambda *_: False),  # it does not know meta
        ):
            stack.enter_context(mock.patch.object(owner, name, stand_in))
        yield


def count_attention(workload: Workload) -> Counts:
    """Forward and backward of a workload of the attention suite, by the backend that ``auto``
    takes."""
    w = workload
    dtype: torch.dtype = getattr(torch, w.dtype)
    segments = SegmentTable.from_lengths([(w.prompt, [w.response] * w.candidates)])
    tokens = segments.num_tokens
    query, key, value = (
        torch.empty(1, heads, tokens, w.head_size, dtype=dtype, device=META, requires_grad=True)
        for heads in (w.heads, w.kv_heads, w.kv_heads)
    )
    counts = Counts(w.name, "merge")
    with meta_is_a_gpu(), Recorder(counts):
        out = backends.attend(query, key, value, segments, visibility=FULL, backend="auto")
        torch.autograd.grad(out, (query, key, value), torch.empty_like(out))
    return _per_element(counts, tokens * w.heads * w.head_size)


def count_model(workload: Workload) -> Counts:
    """Forward and backward of a workload of the step suite up to the last hidden states, over one
    pack."""
    w = workload
    model = random_model(w.model, getattr(torch, w.dtype), META, w.seed)
    fastrank.prepare_model(model)
    ones = torch.ones(w.prompt, dtype=torch.int64)
    group = Group(ones, (ones[: w.response],) * w.candidates, torch.arange(float(w.candidates)))
    (pack,) = fastrank.pack([group] * w.groups, max_tokens=w.groups * group.num_tokens_shared)
    pack = pack.to(META, non_blocking=True)
    counts = Counts(w.name, "model")
    with meta_is_a_gpu(), Recorder(counts):
        hidden: Tensor = _pack_hidden(model, prepared_state(model), pack)
        hidden.backward(torch.empty_like(hidden))
    return _per_element(counts, hidden.numel())


def _per_element(counts: Counts, elements: int) -> Counts:
    for name in ("read", "written", "products_read", "products_written"):
        setattr(counts, name, round(getattr(counts, name) / elements, 3))
    return counts
