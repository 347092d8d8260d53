"""Processes as if on machines of their own: ``machines.py FOLDER``.

Each is a forked child with the environment that a launcher gives to the only process of a machine;
no launcher watches them. A scenario ends with the codes of the processes, what they said, and the
seconds from the event to the end of the last one.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

# What a child would otherwise spend its time on.
import transformers.models.llama.modeling_llama  # noqa: F401

from fastrank.cli.main import main
from fastrank.errors import InputError
from fastrank.training import run as _run  # noqa: F401
from fastrank.training.callbacks import read_metrics
from fastrank.training.together import ending_together

PATIENCE = 90  # seconds


def options(output_dir: Path, **more: object) -> list[str]:
    """A short run of the built-in task."""
    given = {
        "output_dir": output_dir,
        **{"max_steps": 2, "save_steps": 1, "logging_steps": 1, "eval_strategy": "no"},
        **{"eval_groups": 8, "per_device_train_batch_size": 8, "disable_tqdm": "true"},
        **more,
    }
    return ["train", *(word for name, value in given.items() for word in (f"--{name}", f"{value}"))]


def start(folder: Path, commands: Sequence[Sequence[str]]) -> list[int]:
    """Fork a child per command; returns their process ids. Child i writes to ``folder/i.log``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder.mkdir()
    children = []
    for rank, arguments in enumerate(commands):
        child = os.fork()
        if child:
            children.append(child)
            continue
        code = 70
        try:
            log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT)
            os.dup2(log, 1)
            os.dup2(log, 2)
            if len(commands) > 1:
                os.environ |= {"RANK": f"{rank}", "WORLD_SIZE": f"{len(commands)}"}
                os.environ |= {"LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
                os.environ["MASTER_PORT"] = f"{port}"
            torch.set_num_threads(1)
            code = stay(arguments[1]) if arguments[0] == "stay" else main(arguments)
        finally:
            os._exit(code)
    return children


def stay(what: str) -> int:
    """Fail, or go on, and keep every connection of the engine: no collective breaks by itself."""
    dist.init_process_group("gloo")
    try:
        with ending_together():
            if what == "fail":
                raise InputError("an own fault")
            time.sleep(PATIENCE)
    except InputError:
        time.sleep(6)
    return 0


def codes(children: Sequence[int]) -> list[int | None]:
    """The exit codes, None for a child that was still there after `PATIENCE`."""
    found: dict[int, int] = {}
    end = time.monotonic() + PATIENCE
    while len(found) < len(children) and time.monotonic() < end:
        for child in children:
            if child not in found:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    found[child] = os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    for child in children:
        if child not in found:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    return [found.get(child) for child in children]


def scenario(folder: Path, name: str) -> dict[str, object]:
    """Run one; ``kill 0`` and ``kill 1`` kill that process in the middle of training."""
    here = folder / name
    kill = name.partition("kill ")[2]
    if kill:
        runs = [options(folder / f"{name} {rank}", max_steps=100000) for rank in (0, 1)]
    elif name == "disks of their own":
        codes(start(folder / "before", [options(folder / "with checkpoints")]))
        runs = [
            options(folder / run, resume_from_checkpoint="true", max_steps=4)
            for run in ("with checkpoints", "empty")
        ]
    elif name == "raise":  # the second one's folder cannot be made
        (folder / "file").touch()
        runs = [options(folder / "raise 0"), options(folder / "file")]
    elif name == "stuck":
        runs = [["stay", "wait"], ["stay", "fail"]]
    children = start(here, runs)
    begun = time.monotonic()
    if kill:
        metrics = folder / f"{name} 0" / "metrics.jsonl"
        while not any("grad_norm" in row for row in read_metrics(metrics)):
            assert time.monotonic() < begun + PATIENCE
            time.sleep(0.01)
        begun = time.monotonic()
        os.kill(children[int(kill)], signal.SIGKILL)
    ended = codes(children)
    seconds = round(time.monotonic() - begun, 2)
    said = [(here / f"{rank}.log").read_text() for rank in (0, 1)]
    return {"codes": ended, "seconds": seconds, "said": said}


SCENARIOS = ("disks of their own", "raise", "stuck", "kill 0", "kill 1")

if __name__ == "__main__":
    place = Path(sys.argv[1])
    results = {name: scenario(place, name) for name in SCENARIOS}
    (place / "result.json").write_text(json.dumps(results))
