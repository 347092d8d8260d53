"""What a model's folder may say, looked at before anything is made of it."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastrank.errors import InputError, one_line

_LARGEST_JSON = 64 << 20
_INDEX = "model.safetensors.index.json"

#: Numbers of layers, which a model is made of one by one.
_LAYERS = frozenset(
    [
        *("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers"),
        *("decoder_layers", "num_decoder_layers", "num_encoder_layers"),
    ]
)
#: The same for experts, many of which may be one tensor.
_EXPERTS = frozenset(["num_experts", "num_local_experts", "n_routed_experts"])
_MOST = 100_000


def check_model_files(folder: Path, name: str) -> None:
    """Refuse a configuration with more layers than there are tensors, and an index of weights that
    names other files than safetensors of the folder.

    Args:
        folder: with ``config.json``.
        name: of the model, for messages.

    Raises:
        InputError: either is found, or a file of these is no JSON object.
    """
    tensors = _num_tensors(folder, name)
    for key, value in _numbers(_read(folder / "config.json", name)):
        most = _MOST if tensors is None or key in _EXPERTS else tensors
        if key in _LAYERS | _EXPERTS and value > most:
            than = f"{most:,}" if tensors is None or key in _EXPERTS else f"its {most:,} tensors"
            raise InputError(f"{name}: config.json: {key} is {value:.3g}, more than {than}")


def _num_tensors(folder: Path, name: str) -> int | None:
    """Tensors of a model's weights; None if that is not known."""
    if (folder / _INDEX).is_file():
        files = _read(folder / _INDEX, name).get("weight_map")
        if not isinstance(files, dict):
            raise InputError(f"{name}: {_INDEX} has no weight_map")
        for file in files.values():
            if (
                not isinstance(file, str)
                or Path(file).name != file
                or "\\" in file
                or (Path(file).suffix != ".safetensors")
            ):
                raise InputError(
                    f"{name}: {_INDEX} may only name safetensors files of its own folder, got "
                    f"{one_line(repr(file), 80)}"
                )
        return len(files)
    try:
        with (folder / "model.safetensors").open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            return len(json.loads(file.read(size))) if size <= _LARGEST_JSON else None
    except (OSError, ValueError, struct.error, RecursionError):  # loading it says what is wrong
        return None


def _read(file: Path, name: str) -> dict[str, Any]:
    """A JSON object."""
    try:
        if file.stat().st_size > _LARGEST_JSON:
            raise InputError(f"{name}: {file.name} is larger than {_LARGEST_JSON >> 20} MiB")
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{name}: {file.name} cannot be read: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise InputError(f"{name}: {file.name} must hold a JSON object")
    return value


def _numbers(settings: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """All numbers of a configuration, those of its parts too."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _numbers(value)
        elif isinstance(value, (int, float)):
            yield key, value
