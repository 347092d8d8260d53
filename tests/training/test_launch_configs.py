"""The launcher's configurations are ones that accelerate takes, and mean what they say."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from torchrun import environment

from fastrank.errors import InputError
from fastrank.training.checkpoint import latest_checkpoint
from fastrank.training.configs import names, path

without_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)


def _launch(name: str) -> Any:
    parser = launch_command_parser()
    arguments = ["--config_file", str(path(name)), "-m", "fastrank.cli.main", "train"]
    args, _, _ = _validate_launch_command(parser.parse_args(arguments))
    return args


def test_every_configuration_is_read_without_unknown_keys() -> None:
    assert names() == ["ddp", "fsdp2", "nodes", "slurm", "zero2", "zero3"]
    for file in map(path, names()):
        if file.suffix == ".sh":
            subprocess.run(["bash", "-n", str(file)], check=True)
            continue
        config = load_config_from_file(str(file))  # raises for unknown keys
        assert config.mixed_precision == "bf16" and config.num_processes == 2


def test_fsdp2_is_version_2_and_pickles_nothing() -> None:
    env = prepare_multi_gpu_env(_launch("fsdp2"))
    assert env["ACCELERATE_USE_FSDP"] == "true" and env["FSDP_VERSION"] == "2"
    assert env["FSDP_AUTO_WRAP_POLICY"] == "TRANSFORMER_BASED_WRAP"
    assert env["FSDP_STATE_DICT_TYPE"] == "FULL_STATE_DICT"
    assert env["ACCELERATE_MIXED_PRECISION"] == "bf16"


def test_ddp_is_plain() -> None:
    env = prepare_multi_gpu_env(_launch("ddp"))
    assert "ACCELERATE_USE_FSDP" not in env or env["ACCELERATE_USE_FSDP"] == "false"
    assert env["ACCELERATE_MIXED_PRECISION"] == "bf16"


@pytest.mark.parametrize("stage", ["2", "3"])
def test_zero_is_of_its_stage(stage: str) -> None:
    args = _launch(f"zero{stage}")
    args.deepspeed_fields_from_accelerate_config = "zero_stage"  # what `accelerate launch` adds
    _, env = prepare_deepspeed_cmd_env(args)
    assert env["ACCELERATE_USE_DEEPSPEED"] == "true"
    assert env["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == stage


def test_the_command_prints_the_path() -> None:
    command = [sys.executable, "-m", "fastrank.training.configs"]
    done = subprocess.run([*command, "fsdp2"], capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).is_file()
    wrong = subprocess.run([*command, "fsdp"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2 and "did you mean fsdp2?" in wrong.stderr
    with pytest.raises(
        InputError, match="one of ddp, fsdp2, nodes, slurm, zero2, zero3, got 'zero'"
    ):
        path("zero")


def _training(folder: Path, **more: str) -> list[str]:
    """Arguments of a short run."""
    options = {
        **{"output_dir": str(folder / "run"), "max_steps": "2", "save_steps": "1"},
        **{"logging_steps": "1", "eval_groups": "8", "eval_strategy": "no"},
        **{"disable_tqdm": "true", **more},
    }
    return ["train", *(word for key, value in options.items() for word in (f"--{key}", value))]


def _environment(folder: Path, **more: str) -> dict[str, str]:
    """Commands of ``folder`` come first."""
    places = [str(folder), str(Path(sys.executable).parent), os.environ["PATH"]]
    return environment() | {"PATH": os.pathsep.join(places)} | more


def _check_trained(folder: Path, said: str) -> None:
    assert "on 2 process(es)" in said and "2 steps in" in said
    assert latest_checkpoint(folder / "run") == folder / "run" / "checkpoint-2"


def _started(*command: str, folder: Path, dtype: str = "auto", **environ: str) -> str:
    """What a launcher prints whose two processes train for two steps."""
    done = subprocess.run(
        [*command, *_training(folder, dtype=dtype)],
        env=_environment(folder, **environ),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    _check_trained(folder, done.stdout)
    return done.stdout


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _kill(launcher: Any) -> None:
    """With the processes that it started, which are in sessions of their own."""
    pids, found = [launcher.pid] if launcher.poll() is None else [], []
    while pids:
        found.append(pids.pop())
        for children in Path(f"/proc/{found[-1]}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                pids += map(int, children.read_text().split())
    for pid in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    launcher.wait()


@contextlib.contextmanager
def _machines(folder: Path, *arguments: str, **environ: str) -> Iterator[list[Any]]:
    """The launchers of two machines, both here; the second begins when the first one waits for it.
    Each writes to a log in ``folder``."""
    port, launchers = _free_port(), []
    environ |= {"HEAD": "127.0.0.1", "NODES": "2", "PROCESSES": "1", "PORT": str(port)}
    try:
        for machine in ("0", "1"):
            with (folder / f"{machine}.log").open("w") as log:
                launchers.append(
                    subprocess.Popen(
                        ["bash", str(path("nodes")), *arguments],
                        env=_environment(folder, MACHINE=machine, **environ),
                        stdout=log,
                        stderr=log,
                    )
                )
            for _ in range(1200):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                time.sleep(0.1)
        yield launchers
    finally:
        for launcher in launchers:
            _kill(launcher)


def _said(folder: Path) -> list[str]:
    return [(folder / f"{machine}.log").read_text() for machine in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp2", pytest.param("zero2", marks=without_deepspeed)])
def test_machines_train_with_an_engine(engine: str, tmp_path: Path) -> None:
    """``nodes.sh`` with ENGINE, as far as a CPU allows: there accelerate makes DDP of FSDP2."""
    with _machines(tmp_path, *_training(tmp_path), ENGINE=engine) as launchers:
        codes = [launcher.wait(250) for launcher in launchers]
    said = _said(tmp_path)
    assert codes == [0, 0], [text[-3000:] for text in said]
    _check_trained(tmp_path, said[0])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc")
def test_a_machine_that_is_lost_ends_the_run_on_the_other(tmp_path: Path) -> None:
    """Launcher and process of the second machine are killed in the middle of training."""
    with _machines(tmp_path, *_training(tmp_path, max_steps="100000")) as launchers:
        for _ in range(1200):
            if "step 2/" in _said(tmp_path)[0]:
                break
            time.sleep(0.1)
        _kill(launchers[1])
        began = time.monotonic()
        code = launchers[0].wait(90)
        print(f"ended {time.monotonic() - began:.1f} s after it")
    said = _said(tmp_path)[0]
    assert code == 1
    lines = [line for line in said.splitlines() if "stopped: " in line]
    assert len(lines) == 1, lines
    assert "stopped: process 1 on " in lines[0] and "lost (killed, or cut off)" in lines[0]


@pytest.mark.slow
@without_deepspeed
@pytest.mark.parametrize(("name", "dtype"), [("zero2", "float32"), ("zero3", "auto")])
def test_accelerate_launches_zero(name: str, dtype: str, tmp_path: Path) -> None:
    """DeepSpeed runs on CPUs too: in the file's precision, or in float32 where that is asked."""
    launcher = ["accelerate", "launch", "--config_file", str(path(name)), "-m", "fastrank"]
    said = _started(*launcher, folder=tmp_path, dtype=dtype)
    asked = "float32 weights and computation, as asked (the launcher has mixed precision 'bf16')"
    own = "float32 weights, mixed precision 'bf16' as the launcher set"
    assert f"precision: {asked if dtype == 'float32' else own}\n" in said


@pytest.mark.slow
def test_a_slurm_job_trains_on_two_machines(tmp_path: Path) -> None:
    """With stand-ins for SLURM's commands: its srun starts both launchers here, which meet by
    torchrun's rendezvous."""
    for name, text in {
        "scontrol": "echo 127.0.0.1; echo 127.0.0.1",
        "srun": """
            [ "$1" = --kill-on-bad-exit=1 ] && shift
            SLURM_NODEID=0 "$@" & first=$!
            SLURM_NODEID=1 "$@" & second=$!
            wait $first && wait $second""",
    }.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{textwrap.dedent(text)}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NUM_NODES": "2"}
    job |= {"SLURM_JOB_NODELIST": "here[1-2]", "PROCESSES": "1"}
    _started("bash", str(path("slurm")), folder=tmp_path, **job)
