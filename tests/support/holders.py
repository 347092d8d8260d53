"""Another process that holds a lock file."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

from fastrank.data.locks import locked


@contextlib.contextmanager
def another_holder(file: Path, *, with_child: bool = False) -> Iterator[int]:
    """A process that has the lock file, killed at the end; gives its process id.

    Args:
        with_child: whether it forks one of its own, which lives on and whose id is given.
    """
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            with locked(file, "the folder"):
                child = os.fork() if with_child else os.getpid()
                if child:
                    os.write(write, str(child).encode())
                signal.pause()
        finally:
            os._exit(1)
    try:
        given = int(os.read(read, 20))
        yield given
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(read)
        os.close(write)
