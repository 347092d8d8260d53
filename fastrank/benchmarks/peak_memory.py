"""Incremental peak memory of one run: beyond its inputs, results included.

On a GPU the allocator keeps count. On a CPU each variant gets a fresh process: a warm-up run, then
the kernel's high-water mark is reset by writing 5 to ``/proc/self/clear_refs`` and read again after
one more run. (``ru_maxrss`` would keep the peak of the imports.) The C library would hide part of
it by serving a run from pages that an earlier one freed, so the child is told to return large
blocks at once.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pkgutil import resolve_name
from typing import Any

import torch
from torch import Tensor

_TIMEOUT = 1800
_PROMPT_RETURN = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}


def cuda_peak(step: Callable[[], Any], device: torch.device) -> int:
    """Bytes beyond what was allocated before the run, at its peak."""
    gc.collect()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = step()
    torch.cuda.synchronize(device)
    del result
    return torch.cuda.max_memory_allocated(device) - before


def cpu_peak(step: Callable[[], Any]) -> int:
    """Bytes beyond the resident set before the run, at its peak, in this process (Linux)."""
    step()
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except AttributeError:  # another C library than glibc has no such function, nor the need
        pass
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = _resident("VmRSS")
    result = step()
    peak = _resident("VmHWM")
    del result
    return max(0, peak - before)


def fresh_process_peak(maker: str, **arguments: Any) -> int | None:
    """`cpu_peak` in a process of its own; None where the system cannot tell (no Linux).

    Args:
        maker: ``module:function``; the function takes ``arguments`` and returns the step.
        arguments: JSON types.
    """
    if not os.path.exists("/proc/self/clear_refs"):
        return None
    request = json.dumps([maker, torch.get_num_threads(), arguments])
    done = subprocess.run(
        [sys.executable, "-m", __name__, request],
        env={**os.environ, **_PROMPT_RETURN, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=_TIMEOUT,
    )
    if done.returncode:
        raise RuntimeError(f"memory of {maker}: {done.stderr.strip().splitlines()[-1:]}")
    return int(done.stdout.strip().splitlines()[-1])


def saved_for_backward(step: Callable[[], Any], parameters: Iterable[Tensor]) -> int:
    """Bytes of the distinct tensors that autograd keeps during a run, parameters apart."""
    known = {p.untyped_storage().data_ptr() for p in parameters}
    # The storages are held, so that none is freed and its address given to another.
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    return sum(storage.nbytes() for storage in kept.values())


def _resident(field: str) -> int:
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


if __name__ == "__main__":
    _maker, _threads, _arguments = json.loads(sys.argv[1])
    torch.set_num_threads(_threads)
    print(cpu_peak(resolve_name(_maker)(**_arguments)))
