"""Timing: variants take turns in one process, and ratios are ratios of their medians.

A machine's speed drifts; variants that take turns drift together. Every other round runs in the
opposite order. The results of a run are freed outside the timed region.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """Milliseconds per run, sample by sample."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles over the median."""
        if len(self.samples) < 2:
            return 0.0
        first, _, third = statistics.quantiles(self.samples, n=4, method="inclusive")
        return (third - first) / 2 / self.median


def interleave(
    steps: Mapping[str, Callable[[], Any]],
    device: torch.device,
    *,
    seconds: float,
    inner: int = 1,
    repeats: Mapping[str, int] | None = None,
    min_rounds: int = 5,
    max_rounds: int = 200,
    tick: Callable[[str], None] = lambda what: None,
) -> dict[str, Timing]:
    """Time every step, round after round, for about ``seconds`` (``min_rounds`` at least).

    Args:
        steps: variants by name; each has run before.
        inner: calls per sample.
        repeats: runs of the work per call, where that is not 1.
        tick: progress callback.
    """
    sample = _sample_cuda if device.type == "cuda" else _sample_cpu
    repeats = repeats or {}
    samples: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    gc.freeze()  # a collection between rounds then looks only at what the rounds left
    try:
        for name in names:  # one round of warm-up
            sample(steps[name], inner)
        start = time.perf_counter()
        for round_ in range(max_rounds):
            if round_ >= min_rounds and time.perf_counter() - start > seconds:
                break
            tick(f"round {round_ + 1}")
            for name in names if round_ % 2 == 0 else reversed(names):
                elapsed = sample(steps[name], inner)
                samples[name].append(elapsed / inner / repeats.get(name, 1))
            gc.collect()
    finally:
        gc.unfreeze()
        if collecting:
            gc.enable()
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second of a large copy on the device, counting both reads and writes."""
    size = (1 << 30) if device.type == "cuda" else (1 << 28)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timing = interleave({"copy": lambda: target.copy_(source)}, device, seconds=0.2)["copy"]
    return 2 * size / (timing.median / 1e3)


def _sample_cpu(step: Callable[[], Any], inner: int) -> float:
    start = time.perf_counter()
    for _ in range(inner):
        result = step()
    elapsed = time.perf_counter() - start
    del result
    return elapsed * 1e3


def _sample_cuda(step: Callable[[], Any], inner: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(inner):
        result = step()
    end.record()
    torch.cuda.synchronize()
    del result
    return float(start.elapsed_time(end))
