"""Parquet files, read in a limited process of their own and handed on as JSON lines.

Reading in this process would be about a quarter of a second faster to start and save a conversion,
but a damaged or hostile file can crash the format's library, and the training run with it. The
conversion runs beside this process, so that a large file is read about as fast as JSON lines are.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fastrank.data import parquet_child
from fastrank.data.files import one_line
from fastrank.errors import InputError

#: Memory of the reading process beyond its libraries and the size of the file.
MEMORY = 384 << 20
#: Processor time for a batch of rows, by far more than any takes.
SECONDS = 30


def parquet_lines(path: Path, name: str) -> Iterator[bytes]:
    """The rows of a Parquet file as JSON objects, a line each.

    Raises:
        InputError: the file is damaged, crashes its library, or needs more memory or time than
            `MEMORY` (plus the file's size) and `SECONDS`. Raised when that point is reached.
    """
    command = [
        sys.executable,
        "-I",
        parquet_child.__file__,
        str(path.absolute()),
        str(MEMORY + path.stat().st_size),
        str(SECONDS),
        json.dumps(sys.path),
    ]
    # Allocators that reserve address space ahead would take the limit for themselves.
    environment = os.environ | {"ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "1"}
    with (
        tempfile.TemporaryFile() as messages,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=messages,
            env=environment,
        ) as child,
    ):
        assert child.stdout is not None
        try:
            yield from child.stdout
            status = child.wait()
        finally:  # also when nobody wants the rest
            child.kill()
        if status:
            messages.seek(0)
            said = messages.read().decode("utf-8", "replace").strip()
            raise InputError(f"{name}: not a readable Parquet file: {_reason(status, said)}")


def _reason(status: int, said: str) -> str:
    if status == parquet_child.FAILED and said:
        return one_line(said.splitlines()[-1])
    if status < 0:
        try:
            ended = signal.Signals(-status).name
        except ValueError:
            ended = f"signal {-status}"
        if ended == "SIGXCPU":
            return f"reading took more than {SECONDS} s of processor time for a batch of rows"
        return f"it crashed the library that reads it ({ended})"
    return f"the process that read it failed with status {status}"
