"""The launcher's configurations are ones that accelerate takes, and mean what they say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from fastrank.errors import InputError
from fastrank.training.configs import names, path


def _launch(name: str) -> Any:
    parser = launch_command_parser()
    arguments = ["--config_file", str(path(name)), "-m", "fastrank.cli.main", "train"]
    args, _, _ = _validate_launch_command(parser.parse_args(arguments))
    return args


def test_every_configuration_is_read_without_unknown_keys() -> None:
    assert names() == ["ddp", "deepspeed", "fsdp2"]
    for name in names():
        config = load_config_from_file(str(path(name)))  # raises for unknown keys
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


def test_deepspeed_is_zero_2() -> None:
    args = _launch("deepspeed")
    args.deepspeed_fields_from_accelerate_config = "zero_stage"  # what `accelerate launch` adds
    _, env = prepare_deepspeed_cmd_env(args)
    assert env["ACCELERATE_USE_DEEPSPEED"] == "true"
    assert env["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "2"


def test_the_command_prints_the_path() -> None:
    command = [sys.executable, "-m", "fastrank.training.configs"]
    done = subprocess.run([*command, "fsdp2"], capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).is_file()
    wrong = subprocess.run([*command, "fsdp"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2 and "did you mean fsdp2?" in wrong.stderr
    with pytest.raises(InputError, match="one of ddp, deepspeed, fsdp2, got 'zero'"):
        path("zero")
