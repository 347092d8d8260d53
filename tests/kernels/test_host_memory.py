"""Large host buffers ask for large pages, and only inside themselves."""

from __future__ import annotations

import pytest
import torch

from fastrank_kernels import host_memory

CPU = torch.device("cpu")
LARGE = (3, host_memory._SMALLEST // 4)  # three times the least size, in float32


def test_a_large_buffer_is_asked_for_inside_its_own_memory(monkeypatch) -> None:
    asked: list[tuple[int, int, int]] = []
    monkeypatch.setattr(host_memory, "_madvise", lambda: lambda *args: asked.append(args))
    buffer = host_memory.empty(LARGE, torch.float32, CPU)
    (first, length, advice) = asked.pop()
    start, size = buffer.data_ptr(), 4 * buffer.numel()
    assert start <= first < start + (2 << 20) and first % (2 << 20) == length % (2 << 20) == 0
    assert first + length <= start + size < first + length + (2 << 20)
    assert advice == 14
    host_memory.empty((10, 10), torch.float32, CPU)
    host_memory.empty(LARGE, torch.float32, torch.device("meta"))
    assert not asked


@pytest.mark.parametrize("available", [True, False])
def test_the_buffer_is_an_ordinary_tensor(monkeypatch, available) -> None:
    if not available:
        monkeypatch.setattr(host_memory, "_madvise", lambda: None)
    buffer = host_memory.empty(LARGE, torch.float32, CPU).fill_(2.0)
    assert buffer.shape == LARGE and buffer.is_contiguous()
    assert buffer.sum(dtype=torch.float64) == 2.0 * buffer.numel()
