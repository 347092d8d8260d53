"""Output files are there whole or not at all."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from fastrank.data.write import atomic_path, check_output
from fastrank.errors import InputError


def test_appears_only_at_the_end_with_usual_permissions(tmp_path: Path) -> None:
    target = tmp_path / "out.txt"
    target.write_text("older")
    with atomic_path(target) as temporary:
        temporary.write_text("newer")
        assert target.read_text() == "older" and temporary.parent == tmp_path
    assert target.read_text() == "newer" and list(tmp_path.iterdir()) == [target]
    mask = os.umask(0)
    os.umask(mask)
    assert target.stat().st_mode & 0o777 == 0o666 & ~mask


def test_an_error_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "out.txt"
    target.write_text("older")
    with pytest.raises(KeyboardInterrupt), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert target.read_text() == "older" and list(tmp_path.iterdir()) == [target]


def test_check_output(tmp_path: Path) -> None:
    assert check_output(tmp_path / "new.txt") == tmp_path / "new.txt"
    with pytest.raises(InputError, match="does not exist"):
        check_output(tmp_path / "no" / "new.txt")
    with pytest.raises(InputError, match="got a folder"):
        check_output(tmp_path)
    with pytest.raises(InputError, match="no user nosuchuser"):
        check_output("~nosuchuser/new.txt")
    with pytest.raises(InputError, match="File name too long"):
        check_output(tmp_path / ("n" * 300))
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with pytest.raises(InputError, match="circle|levels of symbolic links"):
        check_output(tmp_path / "circle")


def test_a_file_that_may_not_be_replaced(tmp_path: Path) -> None:
    assert check_output(tmp_path / "new.txt", replace=False)
    (tmp_path / "old.txt").touch()
    assert check_output(tmp_path / "old.txt")
    with pytest.raises(InputError, match="--plot .*old.txt is there already: pass --overwrite"):
        check_output(tmp_path / "old.txt", "--plot", replace=False)


def test_only_files_are_replaced(tmp_path: Path) -> None:
    """Not a pipe, a socket or a device: as root, a rename would replace even /dev/null."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    kinds = {"pipe": "a pipe", "link": "a pipe"}
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(tmp_path / "socket"))
    kinds["socket"] = "a socket"
    if os.geteuid() == 0:
        try:
            os.mknod(tmp_path / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
            kinds["null"] = "a device"
        except PermissionError:  # a container without the right to make one
            pass
    for name, kind in kinds.items():
        before = (tmp_path / name).lstat()
        for write in (check_output, lambda path: atomic_path(path).__enter__()):
            with pytest.raises(InputError, match=f"{name}: expected a file, got {kind}"):
                write(tmp_path / name)
        after = (tmp_path / name).lstat()
        assert (after.st_mode, after.st_ino, after.st_rdev) == (
            *(before.st_mode, before.st_ino, before.st_rdev),
        )


def test_a_link_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("older")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with atomic_path(tmp_path / "link") as temporary:
        temporary.write_text("newer")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "newer"
