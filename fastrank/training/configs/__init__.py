"""Ready configurations for ``accelerate launch``: data parallel, FSDP2, DeepSpeed.

The launcher wants a file, so a command prints where it is:

    accelerate launch --config_file "$(python -m fastrank.training.configs fsdp2)" \
        --num_processes 8 -m fastrank.cli.main train --model MODEL --data FILE
"""

from __future__ import annotations

import difflib
from pathlib import Path

from fastrank.errors import InputError


def names() -> list[str]:
    """The configurations that there are."""
    return sorted(file.stem for file in Path(__file__).parent.glob("*.yaml"))


def path(name: str) -> Path:
    """The file of a configuration, e.g. ``path("fsdp2")``.

    Raises:
        InputError: there is none of that name.
    """
    if name not in names():
        near = difflib.get_close_matches(name, names(), 1)
        hint = f", did you mean {near[0]}?" if near else ""
        raise InputError(f"configuration must be one of {', '.join(names())}, got {name!r}{hint}")
    return Path(__file__).parent / f"{name}.yaml"
