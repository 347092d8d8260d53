"""``fastrank`` on an engine's own code for GPUs, on CPU processes: ``forced_command.py ENGINE
COMMAND ...``; see `forced_engines`."""

from __future__ import annotations

import sys

import torch
from forced_engines import force_engine

from fastrank.cli.main import main

if __name__ == "__main__":
    torch.set_num_threads(1)
    force_engine(sys.argv[1])
    sys.exit(main(sys.argv[2:]))
