"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastrank.errors import InputError


def check_output(path: str | Path, what: str = "output") -> Path:
    """The path of a file to be written, checked before any work is done for it.

    Raises:
        InputError: it is a folder, or its own folder is not there or may not be written.
    """
    target = Path(path).expanduser()
    folder = target.parent
    if target.is_dir():
        raise InputError(f"{what} {path}: expected a file, got a folder")
    if not folder.is_dir():
        raise InputError(f"{what} {path}: the folder {folder} does not exist")
    if not os.access(folder, os.W_OK):
        raise InputError(f"{what} {path}: the folder {folder} cannot be written")
    return target


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside ``path``, renamed to it at the end and removed on any error.

    The file is flushed to the disk before the rename, so that an interruption leaves the old file
    or the new one. It gets the permissions that a newly created file would have.
    """
    target = Path(path).expanduser()
    handle, name = tempfile.mkstemp(
        prefix=f".{target.name}.", suffix=target.suffix, dir=target.parent
    )
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
