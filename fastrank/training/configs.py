"""Ready files for launchers: configurations of ``accelerate launch`` for data parallelism, FSDP2
and DeepSpeed, and scripts for several machines (torchrun's rendezvous) and SLURM.

A launcher wants a file, so a command prints its path:

    accelerate launch --config_file "$(python -m fastrank.training.configs fsdp2)" \
        --num_processes 8 -m fastrank train --model MODEL --data FILE
    HEAD=10.0.0.1 NODES=4 bash "$(python -m fastrank.training.configs nodes)" train ...
    sbatch "$(python -m fastrank.training.configs slurm)" train ...
"""

from __future__ import annotations

import difflib
import sys
from pathlib import Path

from fastrank.errors import InputError

_FOLDER = Path(__file__).parent / "launch"


def names() -> list[str]:
    """The available configurations and scripts."""
    return sorted(file.stem for file in _FOLDER.iterdir())


def path(name: str) -> Path:
    """The file of a configuration or script, e.g. ``path("fsdp2")``.

    Raises:
        InputError: no configuration has that name.
    """
    if name not in names():
        near = difflib.get_close_matches(name, names(), 1)
        hint = f", did you mean {near[0]}?" if near else ""
        raise InputError(f"configuration must be one of {', '.join(names())}, got {name!r}{hint}")
    (file,) = _FOLDER.glob(f"{name}.*")
    return file


def main(argv: list[str]) -> int:
    if len(argv) != 1 or argv[0] in ("-h", "--help"):
        print(f"usage: python -m fastrank.training.configs {{{','.join(names())}}}")
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    try:
        print(path(argv[0]))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
