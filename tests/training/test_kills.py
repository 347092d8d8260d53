"""SIGKILL and Ctrl-C at random moments: every run resumes to the same weights and losses, bit for
bit."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import kill_training
import psutil
import pytest
from torchrun import command, environment, torchrun

from fastrank.training.callbacks import read_metrics
from fastrank.training.checkpoint import damage, find_checkpoints

pytestmark = pytest.mark.slow

TIMED = ("tokens_per_second", "runtime", "per_second")


def _rows(run: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in row.items() if not any(word in key for word in TIMED)}
        for row in read_metrics(run / "metrics.jsonl")
        if "train_runtime" not in row
    ]


def _assert_same_run(run: Path, whole: Path) -> None:
    assert (run / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert _rows(run) == _rows(whole)
    assert not list(run.glob(".*"))  # no lock, nothing staged or discarded
    names = [path.name for path in find_checkpoints(run)]
    assert names == [path.name for path in find_checkpoints(whole)]
    assert all(damage(path) is None for path in find_checkpoints(run))


def _tracebacks(log: str) -> int:
    """How many tracebacks a run has left, but for those with which Python itself tells that a
    Ctrl-C came while it called a finaliser, where nothing can be raised."""
    return log.count("Traceback") - len(
        re.findall(r"^Exception ignored in:.*\nTraceback", log, re.M)
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    ("how", "codes"),
    [
        ("kill", {0, -signal.SIGKILL}),
        ("once", {0, 128 + signal.SIGINT}),
        ("twice", {0, 128 + signal.SIGINT}),
    ],
)
def test_twenty_ends(how: str, codes: set[int], tmp_path: Path) -> None:
    script = str(Path(kill_training.__file__))
    done = subprocess.run(
        [sys.executable, script, str(tmp_path), "1", "20", how],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["kills"] >= 20
    assert set(result["codes"]) == codes
    whole = tmp_path / "whole"
    steps = [row["step"] for row in _rows(whole) if "grad_norm" in row]
    assert steps == list(range(1, kill_training.STEPS + 1))
    for number in range(result["runs"]):
        _assert_same_run(tmp_path / f"run-{number}", whole)
        assert _tracebacks((tmp_path / f"run-{number}.log").read_text()) == 0
    print(f"kills at {result['at']} of the run, {result['in_a_save']} during a save")


def _end_after(arguments: list[str], run: Path, steps: int, delay: float, how: int) -> str:
    """Start two processes and send them and their launcher a signal, ``delay`` seconds after so
    many steps more than a run has; what they said."""
    before = max((int(path.name.rpartition("-")[2]) for path in find_checkpoints(run)), default=0)
    metrics = run / "metrics.jsonl"
    metrics.unlink(missing_ok=True)  # a run writes it anew when it begins to train
    process = subprocess.Popen(
        command(2, *arguments),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        end = time.monotonic() + 240
        while not any(row["step"] >= before + steps for row in read_metrics(metrics)):
            assert process.poll() is None, f"ended with {process.returncode} after step {before}"
            assert time.monotonic() < end, f"did not come {steps} steps beyond {before}"
            time.sleep(0.005)
        time.sleep(delay)
        assert process.poll() is None, "ended before the signal"
        workers = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, how)
        if how == signal.SIGKILL:  # torchrun's workers have groups of their own
            for worker in workers:
                with contextlib.suppress(psutil.NoSuchProcess):
                    worker.kill()
        return process.communicate(timeout=60)[1]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_three_ends_of_two_processes(how: signal.Signals, tmp_path: Path) -> None:
    def arguments(run: Path) -> list[str]:
        return ["-m", "fastrank.cli.main", *kill_training.options(run)]

    whole, run = tmp_path / "whole", tmp_path / "run"
    torchrun(2, *arguments(whole))
    generator = random.Random(4)
    for _ in range(3):  # of 12 steps
        said = _end_after(arguments(run), run, 1, generator.uniform(0, 0.05), how)
        if how != signal.SIGKILL:
            assert said.count(f"interrupted ({how.name}) after step") == 1, said
            assert said.count("on 2 processes)") == 1
    torchrun(2, *arguments(run))
    _assert_same_run(run, whole)
