"""The launcher's configurations are ones that accelerate takes, and mean what they say."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import textwrap
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


def _started(*command: str, folder: Path, dtype: str = "auto", **environ: str) -> str:
    """What a launcher prints whose two processes train for two steps."""
    options = {
        **{"output_dir": str(folder / "run"), "dtype": dtype},
        **{"max_steps": "2", "save_steps": "1", "logging_steps": "1", "eval_groups": "8"},
        **{"eval_strategy": "no", "disable_tqdm": "true"},
    }
    places = [str(folder), str(Path(sys.executable).parent), os.environ["PATH"]]
    done = subprocess.run(
        [
            *command,
            "train",
            *(word for key, value in options.items() for word in (f"--{key}", value)),
        ],
        env=environment() | {"PATH": os.pathsep.join(places)} | environ,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert "on 2 process(es)" in done.stdout and "2 steps in" in done.stdout
    assert latest_checkpoint(folder / "run") == folder / "run" / "checkpoint-2"
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="no deepspeed here")
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
