"""Incremental peak memory of one run: what it needs beyond its inputs, results included.

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
from collections.abc import Iterable

import torch
from torch import Tensor

from .problem import Problem, Step, build
from .workloads import Workload

_TIMEOUT = 1800
_PROMPT_RETURN = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}


def cuda_peak(step: Step, device: torch.device) -> int:
    """Bytes beyond what was allocated before the run, at its peak."""
    gc.collect()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = step()
    torch.cuda.synchronize(device)
    del result
    return torch.cuda.max_memory_allocated(device) - before


def saved_for_backward(step: Step, parameters: Iterable[Tensor]) -> int:
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


def cpu_peak(workload: Workload, variant: str) -> int | None:
    """The same for a variant on the CPU, in a process of its own; None where the system cannot
    tell (no Linux)."""
    if not os.path.exists("/proc/self/clear_refs"):
        return None
    request = json.dumps(
        {"workload": workload.as_dict(), "variant": variant, "threads": torch.get_num_threads()}
    )
    environment = {**os.environ, **_PROMPT_RETURN, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-m", "fastrank.benchmarks.memory", request],
        env=environment,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT,
    )
    if done.returncode:
        raise RuntimeError(f"memory of {variant}: {done.stderr.strip().splitlines()[-1:]}")
    return int(done.stdout.strip().splitlines()[-1])


def own_peak(step: Step) -> int:
    """Bytes beyond the resident set at its peak during one run, in this process."""
    step()
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except AttributeError:  # another C library than glibc has no such function, nor the need
        pass
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = _status("VmRSS")
    result = step()
    peak = _status("VmHWM")
    del result
    return max(0, peak - before)


def _status(field: str) -> int:
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _main(request: str) -> None:
    fields = json.loads(request)
    torch.set_num_threads(fields["threads"])
    problem: Problem = build(Workload.from_dict(fields["workload"]), torch.device("cpu"))
    variants = {v.name: v for v in problem.variants()}
    print(own_peak(variants[fields["variant"]].make(problem)))


if __name__ == "__main__":
    _main(sys.argv[1])
