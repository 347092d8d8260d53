"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastrank.errors import InputError
from fastrank.options.paths import absolute_path, file_kind


def check_output(path: str | Path, what: str = "output", *, replace: bool = True) -> Path:
    """The path of a file to be written, checked before any work is done for it.

    A link is followed: the file that it leads to is written. ``replace``: whether there may be a
    file already.

    Raises:
        InputError: there is a file that may not be replaced; it is a folder, a device, a pipe or a
            socket, or its own folder is not there or may not be written.
    """
    target = absolute_path(path)
    try:
        target = target.resolve()
        kind = file_kind(target)
        if kind not in (None, "a file"):
            raise InputError(f"{what} {path}: expected a file, got {kind}")
        if kind is not None and not replace:
            raise InputError(
                f"{what} {path} is there already: pass --overwrite to replace it, or another path"
            )
        if not target.parent.is_dir():
            raise InputError(f"{what} {path}: its folder does not exist")
    except (OSError, RuntimeError) as error:  # a name that is too long, links in a circle
        reason = getattr(error, "strerror", None) or "links in a circle"
        raise InputError(f"{what} {str(path)[:200]}: {reason}") from error
    if not os.access(target.parent, os.W_OK):
        raise InputError(f"{what} {path}: its folder cannot be written")
    return target


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside ``path``, renamed to it at the end and removed on any error.

    The file is flushed to the disk before the rename, so that an interruption leaves the old file
    or the new one. It gets the permissions that a newly created file would have.

    Raises:
        InputError: as of `check_output`.
    """
    target = check_output(path)
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
