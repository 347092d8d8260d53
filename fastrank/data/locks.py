"""One process at a time writes a folder or a file; another one learns which has it.

The lock is the system's (``flock``): it ends with its process, however that ends, so that no lock
file of a killed run has to be removed by hand. Forked children (loader and tokenising processes)
give up what they inherit of it. A lock file that was removed and made anew between opening and
locking it is told by its inode. `filelock` has no text that names the holder, and empties the file
of the one who has the lock.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fastrank.errors import InputError

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"  # in a folder
_LONGEST = 4096  # bytes of what is said about a holder


@dataclass
class _Held:
    handle: int | None  # None where the system has no locks
    made: list[Path]  # folders made for the lock file, outermost first
    count: int = 0


#: This process's locks, by lock file.
_held: dict[Path, _Held] = {}


@contextlib.contextmanager
def locked(file: Path, what: str, *, again: bool = True) -> Iterator[bool]:
    """Hold a lock file, made with its folder where there is none, and removed at the end with those
    folders that have stayed empty. Gives whether no other process can hold it meanwhile; without
    locks (Windows, some network disks) that is not known.

    Args:
        file: the lock file.
        what: is written, for the message, e.g. ``"output_dir run"``.
        again: whether this process may hold it several times.

    Raises:
        InputError: another process holds it, named with its command and since when.
        OSError: the lock file cannot be made.
    """
    made = _make_folders(file.parent)
    file = file.parent.resolve() / file.name
    held = _held.get(file)
    if held is None:
        try:
            held = _held[file] = _Held(_acquire(file, what), made)
        except BaseException:
            _remove_empty(made)
            raise
    elif not again:
        raise InputError(f"{what} is being written by this process already")
    held.count += 1
    try:
        yield held.handle is not None
    finally:
        held.count -= 1
        if not held.count and _held.pop(file, None) is not None:
            _release(file, held)


def locked_folder(folder: Path, name: str) -> contextlib.AbstractContextManager[bool]:
    """`locked`, of a folder that the option ``name`` has chosen; made where there is none."""
    return locked(folder / LOCK_FILE, f"{name} {folder}")


def _acquire(file: Path, what: str) -> int | None:
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(handle, _LONGEST, 0)
            os.close(handle)
            raise InputError(
                f"{what} is being written by another run: {_described(holder)}; let it end, or "
                "write elsewhere"
            ) from None
        except OSError as error:
            os.close(handle)
            logger.warning("%s cannot be locked (%s): keep other runs away", what, error.strerror)
            return None
        if _is_at(handle, file):
            os.ftruncate(handle, 0)
            os.pwrite(handle, _own_description(), 0)
            return handle
        os.close(handle)


def _release(file: Path, held: _Held) -> None:
    if held.handle is not None:
        with contextlib.suppress(OSError):
            if _is_at(held.handle, file):
                file.unlink()
        os.close(held.handle)
    _remove_empty(held.made)


def _is_at(handle: int, file: Path) -> bool:
    """Whether an open file is the one at this path."""
    try:
        return os.path.samestat(os.fstat(handle), file.stat())
    except FileNotFoundError:
        return False


def _own_description() -> bytes:
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    about = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": re.sub(r"(token[ =])\S+", r"\1...", command)[:300],
    }
    return json.dumps(about).encode()


def _described(text: bytes) -> str:
    try:
        about = json.loads(text)
        return "process {pid} on {host}, since {since} ({command})".format(**about)
    except (ValueError, TypeError, KeyError):  # about to be written
        return "it has just begun"


def _make_folders(folder: Path) -> list[Path]:
    """Make a folder and those around it; returns the new ones, outermost first."""
    absent = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return absent[::-1]


def _remove_empty(folders: list[Path]) -> None:
    with contextlib.suppress(OSError):
        for folder in reversed(folders):
            folder.rmdir()


def _forget() -> None:
    """A forked child closes its copies, which would keep the locks beyond the parent's end."""
    for held in _held.values():
        if held.handle is not None:
            os.close(held.handle)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
