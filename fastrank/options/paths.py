"""Paths as people give them."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from fastrank.errors import InputError


def local_path(given: str | Path) -> Path:
    """The path that a text means, with the home folder of a leading ``~``.

    Raises:
        InputError: there is no such user, or the text has a character that no path can have.
    """
    text = os.fspath(given)
    if "\0" in text:
        raise InputError(f"a path cannot hold a NUL character, got {text[:80]!r}")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        user = text.split(os.sep)[0]
        raise InputError(f"{text[:200]}: no user {user[1:]}, whose home {user} would be") from error


def absolute_path(given: str | Path) -> Path:
    """As `local_path`, from the root: the same file wherever a user's function goes later."""
    return Path(os.path.abspath(local_path(given)))


def file_kind(path: Path) -> str | None:
    """What is at a path, in words: "a file", "a folder", or something that reading might never end
    of; None for nothing."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return None
    names = {stat.S_IFREG: "a file", stat.S_IFDIR: "a folder", stat.S_IFSOCK: "a socket"}
    names |= {stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
    return names.get(stat.S_IFMT(mode), "no file")
