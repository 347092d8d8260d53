"""Ends training runs at random moments and resumes them: ``kill_training.py DIR SEED COUNT HOW``.

HOW is ``kill``, ``once`` (Ctrl-C) or ``twice``.

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
import traceback
from pathlib import Path

import torch

# What a child would otherwise spend its time on.
import transformers.models.llama.modeling_llama  # noqa: F401

from fastrank.cli.main import main
from fastrank.training import interrupts
from fastrank.training import run as _run  # noqa: F401

STEPS = 12
KILLS_A_RUN = 2


def options(output_dir: Path) -> list[str]:
    """A short run of the built-in task that saves after every step."""
    return [
        *("train", "--output_dir", str(output_dir), "--max_steps", str(STEPS)),
        *("--logging_steps", "1", "--save_steps", "1", "--save_total_limit", "2"),
        *("--eval_strategy", "no", "--eval_groups", "8", "--per_device_train_batch_size", "8"),
        *("--disable_tqdm", "true", "--resume_from_checkpoint", "auto"),
    ]


def start(output_dir: Path) -> int:
    """Fork a child that trains; returns its process id."""
    child = os.fork()
    if child:
        return child
    code = 128 + signal.SIGINT  # of Ctrl-C before the command begins: Python's own end
    try:
        log = os.open(output_dir.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        torch.set_num_threads(1)
        interrupts._TOGETHER = 0.0  # the second Ctrl-C follows at once
        signal.signal(signal.SIGINT, signal.default_int_handler)
        code = 70  # unless the command gives one
        code = main(options(output_dir))
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(code)


def finish(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def has_ended(child: int, seconds: float) -> int | None:
    """The exit code of a child that ends within some seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    return None


def end_after(child: int, moments: list[float], number: int) -> tuple[bool, int]:
    """Send a signal after each of some times; whether all were sent, and the exit code."""
    for moment in moments:
        code = has_ended(child, moment)
        if code is not None:
            return False, code
        os.kill(child, number)
    return True, finish(child)


def experiment(folder: Path, seed: int, kills: int, how: str) -> None:
    generator = random.Random(seed)
    number_sent = signal.SIGKILL if how == "kill" else signal.SIGINT
    begun = time.monotonic()
    codes = [finish(start(folder / "whole"))]
    duration = time.monotonic() - begun
    done, staged, moments, number = 0, 0, [], 0
    while done < kills:
        run = folder / f"run-{number}"
        number += 1
        for _ in range(KILLS_A_RUN):
            moment = generator.uniform(0, duration)
            # A second Ctrl-C comes while the step is finished and saved, often too late.
            more = [generator.uniform(0, 0.03)] if how == "twice" else []
            killed, code = end_after(start(run), [moment, *more], number_sent)
            if killed:
                done += 1
                moments.append(round(moment / duration, 3))
                staged += bool(list(run.glob(".staging*")))
            codes.append(code)
        codes.append(finish(start(run)))
    result = {"codes": codes, "kills": done, "runs": number, "in_a_save": staged, "at": moments}
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    experiment(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
