"""Kills training runs at random moments and resumes them: ``kill_training.py FOLDER SEED KILLS``.

Each run is a forked child of a process that has imported everything and computed nothing, so
that a start costs a fraction of a second and the kills fall into training and saving, not into
imports.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

# What a child would otherwise spend its time on.
import transformers.models.llama.modeling_llama  # noqa: F401

from fastrank.cli.main import main
from fastrank.training import run as _run  # noqa: F401

STEPS = 12
KILLS_A_RUN = 2


def options(output_dir: Path) -> list[str]:
    """A short run of the built-in task that saves after every step."""
    return [
        *("train", "--output_dir", str(output_dir), "--max_steps", str(STEPS)),
        *("--logging_steps", "1", "--save_steps", "1", "--save_total_limit", "2"),
        *("--eval_strategy", "no", "--eval_groups", "8", "--per_device_train_batch_size", "8"),
        *("--disable_tqdm", "true", "--resume_from_checkpoint", "true"),
    ]


def start(output_dir: Path) -> int:
    """Fork a child that trains; returns its process id."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        log = os.open(output_dir.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        torch.set_num_threads(1)
        code = main(options(output_dir))
    finally:
        os._exit(code)


def finish(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_after(child: int, seconds: float) -> tuple[bool, int]:
    """Whether the child was still at work, and its exit code."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return False, os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    return True, finish(child)


def experiment(folder: Path, seed: int, kills: int) -> None:
    generator = random.Random(seed)
    begun = time.monotonic()
    codes = [finish(start(folder / "whole"))]
    duration = time.monotonic() - begun
    done, staged, moments, number = 0, 0, [], 0
    while done < kills:
        run = folder / f"run-{number}"
        number += 1
        for _ in range(KILLS_A_RUN):
            moment = generator.uniform(0, duration)
            killed, code = kill_after(start(run), moment)
            if killed:
                done += 1
                moments.append(round(moment / duration, 3))
                staged += bool(list(run.glob(".staging*")))
            codes.append(code)
        codes.append(finish(start(run)))
    result = {"codes": codes, "kills": done, "runs": number, "in_a_save": staged, "at": moments}
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    experiment(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
