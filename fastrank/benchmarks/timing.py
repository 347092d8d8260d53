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
from functools import partial
from typing import Any

import torch

_CYCLES_PER_SECOND = 2e9  # at least the clock of today's chips


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
    queued: bool = False,
    tick: Callable[[str], None] = lambda what: None,
) -> dict[str, Timing]:
    """Time every step, round after round, for about ``seconds`` (``min_rounds`` at least).

    Args:
        steps: variants by name; each has run before.
        inner: calls per sample.
        repeats: runs of the work per call, where that is not 1.
        queued: on a GPU, keep the device busy until the host has queued the sample.
        tick: progress callback.
    """
    sample: Callable[[Callable[[], Any], int], float] = _sample_cpu
    if device.type == "cuda":
        sample = partial(_sample_cuda, queued=queued)
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
    """Bytes per second of a large copy of random data on the device, counting reads and writes."""
    size = (1 << 30) if device.type == "cuda" else (1 << 28)
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timing = interleave({"copy": lambda: target.copy_(source)}, device, seconds=0.2)["copy"]
    return 2 * size / (timing.median / 1e3)


def product_rate(device: torch.device, size: int = 8192) -> float:
    """Operations per second of a product of random square bfloat16 matrices on the device. Zeros
    would be faster: a chip's clock follows its power."""
    left, right, out = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(3))
    timing = interleave({"mm": lambda: torch.mm(left, right, out=out)}, device, seconds=0.2)["mm"]
    return 2 * size**3 / (timing.median / 1e3)


def _sample_cpu(step: Callable[[], Any], inner: int) -> float:
    start = time.perf_counter()
    result = _run(step, inner)
    elapsed = time.perf_counter() - start
    del result
    return elapsed * 1e3


def _sample_cuda(step: Callable[[], Any], inner: int, queued: bool) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    if queued:
        # As long as the host needs for the sample, measured by one, and a half more.
        begun = time.perf_counter()
        _run(step, inner)
        busy = 1.5 * (time.perf_counter() - begun)
        torch.cuda.synchronize()
        torch.cuda._sleep(int(busy * _CYCLES_PER_SECOND))
    start.record()
    result = _run(step, inner)
    end.record()
    torch.cuda.synchronize()
    del result
    return float(start.elapsed_time(end))


def _run(step: Callable[[], Any], inner: int) -> Any:
    for _ in range(inner):
        result = step()
    return result
