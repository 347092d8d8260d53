"""What checksums cost: a checkpoint of a 1 GB model, its start-up, the start from a cache.

    python bench/checksums.py --gigabytes 1 --output bench/results

A checkpoint is written and published as training does it (model and optimiser's state, three times
the weights), and read as a resumed run does it: the latest one is found, weights and optimiser's
state are loaded. The same with checksums and without take turns in one process; the ratio is of the
medians. A start is a process of its own, which imports what training imports and reads the
checkpoint. The cache's entry has 100 MB. Needs disk for two checkpoints.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file, save_file

from fastrank.benchmarks.provenance import provenance
from fastrank.data import cached_groups, manifest
from fastrank.data.records import Record
from fastrank.training import checkpoint

ROOT = Path(__file__).resolve().parents[1]
FIELDS = ("what", "megabytes", "seconds", "seconds_without", "ratio")
LAYER = 1 << 24  # numbers of a tensor: 64 MB


def write(
    run: Path, weights: dict[str, torch.Tensor], state: dict[str, Any], checksums: bool
) -> None:
    """Write checkpoint 1, in place of the one before."""
    name = checkpoint.new_staging_name()
    staged = checkpoint.begin_staging(run, name) / checkpoint.checkpoint_name(1)
    staged.mkdir()
    save_file(weights, staged / "model.safetensors")
    torch.save(state, staged / "optimizer.pt")
    with nullcontext() if checksums else mock.patch.object(manifest, "file_checksum", lambda _: ""):
        checkpoint.publish(staged, run, {}, {})
    checkpoint.clean_staging(run, name)


def read(run: Path, checksums: bool) -> None:
    found = checkpoint.resolve_resume(True, run, checksums=checksums)
    assert found is not None
    load_file(found / "model.safetensors")
    torch.load(found / "optimizer.pt", weights_only=True)


def start(run: Path, checksums: bool) -> None:
    """`read` in a new process, as the start of training."""
    choice = () if checksums else ("--without",)
    subprocess.run([sys.executable, __file__, "--start", str(run), *choice], check=True)


def compare(action: Callable[[bool], object], rounds: int) -> dict[str, float]:
    """Median seconds with checksums and without, taking turns after a first call of each."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for number in range(rounds + 1):
        for wanted in (True, False) if number % 2 else (False, True):
            began = time.perf_counter()
            action(wanted)
            if number:
                seconds[wanted].append(time.perf_counter() - began)
    on, off = (statistics.median(seconds[wanted]) for wanted in (True, False))
    return {"seconds": on, "seconds_without": off, "ratio": on / off}


def measure(work: Path, gigabytes: float, rounds: int) -> Iterator[dict[str, object]]:
    count = max(1, round(gigabytes * 1e9 / (4 * LAYER)))
    weights = {f"layer.{i}.weight": torch.rand(LAYER) for i in range(count)}
    state = {
        name: {"exp_avg": value.clone(), "exp_avg_sq": value.clone()}
        for name, value in weights.items()
    }
    run = work / "run"
    size = sum(value.nbytes for value in weights.values()) / 1e6

    about = {"what": "checkpoint written", "megabytes": 3 * size}
    yield about | compare(lambda checksums: write(run, weights, state, checksums), rounds)
    write(run, weights, state, True)
    about = {"what": "checkpoint read", "megabytes": 3 * size}
    yield about | compare(lambda checksums: read(run, checksums), rounds)
    about = {"what": "resumed run started", "megabytes": 3 * size}
    yield about | compare(lambda checksums: start(run, checksums), rounds)
    shutil.rmtree(run)
    folder = work / "groups-bench"
    folder.mkdir()
    record = Record("prompt", ["a"] * 4, [0.0, 1.0, 2.0, 3.0], line=1)
    tokens = [list(range(100))] * 4
    with cached_groups.group_writer(folder / "groups-00000.arrow") as add:
        for _ in range(240):
            add([(record, (list(range(100)), tokens))] * 256)
    files = cached_groups.group_files(folder)
    listed = manifest.written_files(folder, files)

    seconds = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        assert manifest.damaged_file(folder, listed) is None
        seconds.append(time.perf_counter() - began)
    megabytes = sum(file.stat().st_size for file in files) / 1e6
    yield {
        "what": "cache entry verified",
        "megabytes": megabytes,
        "seconds": statistics.median(seconds[1:]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of the model's weights")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, help="folder on the disk to measure")
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--without", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.start:
        import fastrank.training.run  # noqa: F401

        read(args.start, not args.without)
        return
    about = provenance(torch.device("cpu"))
    rows = []
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        for row in measure(Path(work), args.gigabytes, args.rounds):
            print("; ".join(f"{k} {v:.4g}" if isinstance(v, float) else str(v)
                            for k, v in row.items()), flush=True)  # fmt: skip
            rows.append(row | about)
    args.output.mkdir(parents=True, exist_ok=True)
    with (args.output / "checksums.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*FIELDS, *about])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
