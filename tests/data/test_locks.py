"""One holder of a lock file at a time, however the others end."""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path

import pytest
from holders import another_holder

from fastrank.data import locks
from fastrank.data.locks import LOCK_FILE, locked, locked_folder
from fastrank.errors import InputError

fcntl = pytest.importorskip("fcntl")


def test_another_process_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/bin/fastrank", "train", "--hub_token", "hf_secret", "--x"])
    folder = tmp_path / "run"
    with another_holder(folder / LOCK_FILE) as pid:
        with pytest.raises(InputError) as caught, locked_folder(folder, "output_dir"):
            pass
        assert re.fullmatch(
            rf"output_dir {folder} is being written by another run: process {pid} on \S+, since "
            r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \(fastrank train --hub_token \.\.\. --x\); .*",
            str(caught.value),
        )
        (folder / LOCK_FILE).write_bytes(b"[1")  # its text is not written yet, or damaged
        with pytest.raises(InputError, match="it has just begun"), locked_folder(folder, "x"):
            pass
    assert (folder / LOCK_FILE).exists()  # of a killed run
    with locked_folder(folder, "output_dir") as alone:
        assert alone
    assert list(folder.iterdir()) == []


def test_a_child_does_not_keep_the_lock_of_its_parent(tmp_path: Path) -> None:
    with another_holder(tmp_path / LOCK_FILE, with_child=True) as child:
        pass
    try:
        with locked_folder(tmp_path, "folder"):
            os.kill(child, 0)  # still there
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_process_may_hold_a_folder_twice_and_a_journal_once(tmp_path: Path) -> None:
    file = tmp_path / LOCK_FILE
    with locked_folder(tmp_path, "folder"):
        with locked_folder(tmp_path / ".." / tmp_path.name, "folder"):
            pass
        assert file.exists()
        with pytest.raises(InputError, match="journal is being written by this process already"):
            with locked(file, "journal", again=False):
                pass
        read, write = os.pipe()
        if not os.fork():  # a child has nothing of its parent's
            try:
                with locked_folder(tmp_path, "folder"):
                    os.write(write, b"held")
            except InputError:
                os.write(write, b"refused")
            finally:
                os._exit(0)
        assert os.read(read, 10) == b"refused"
        os.wait()
        os.close(read)
        os.close(write)
    assert not file.exists() and not locks._held


def test_only_folders_that_stay_empty_are_removed(tmp_path: Path) -> None:
    with locked_folder(tmp_path / "a" / "b", "folder"):
        assert (tmp_path / "a" / "b" / LOCK_FILE).is_file()
    assert list(tmp_path.iterdir()) == []
    with locked_folder(tmp_path / "a" / "b", "folder"):
        (tmp_path / "a" / "kept").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["kept"]
    (tmp_path / "c").mkdir()
    with locked_folder(tmp_path / "c", "folder"):
        pass
    assert (tmp_path / "c").is_dir()


def test_a_lock_file_that_is_removed_before_it_is_locked_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock, calls = fcntl.flock, []

    def removed_first(handle: int, operation: int) -> None:
        if not calls:
            (tmp_path / LOCK_FILE).unlink()  # as the run before does at its end
        calls.append(handle)
        flock(handle, operation)

    monkeypatch.setattr(fcntl, "flock", removed_first)
    with locked_folder(tmp_path, "folder"):
        assert len(calls) == 2 and (tmp_path / LOCK_FILE).is_file()


def test_a_disk_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unsupported(*args: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with locked_folder(tmp_path, "folder") as alone:
        assert not alone
    assert len(caplog.messages) == 1 and "cannot be locked" in caplog.messages[0]
