"""Output files are there whole or not at all."""

from __future__ import annotations

import os
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
