"""A run that fails in one process ends in all of them, also on machines without a launcher's eyes.

Times are not asserted: a process that did not end is killed after a minute and a half, and has no
exit code then.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machines
import pytest
from torchrun import environment, filled_once

from fastrank.errors import InputError
from fastrank.training import checkpoint

KILLED = "lost (killed, or cut off)"


@pytest.fixture
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    def fill(folder: Path) -> None:
        done = subprocess.run(
            [sys.executable, machines.__file__, str(folder)],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]

    folder = filled_once(tmp_path_factory, "machines", fill)
    results: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return results


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    ("name", "codes", "said"),
    [
        ("raise", [1, 2], "process 1 on {host}: output_dir {file} must be a folder, got a file"),
        ("stuck", [1, 0], "process 1 on {host}: an own fault"),
        ("kill 0", [-9, 1], f"process 0 on {{host}}: {KILLED}"),
        ("kill 1", [1, -9], f"process 1 on {{host}}: {KILLED}"),
    ],
)
def test_the_others_end_and_name_it(
    found: dict[str, Any], name: str, codes: list[int], said: str
) -> None:
    got = found[name]
    print(f"{name}: all ended {got['seconds']} s after it")
    assert got["codes"] == codes
    (line,) = [line for line in got["said"][codes.index(1)].splitlines() if "stopped" in line]
    assert ": stopped: process " in line
    host, file = checkpoint.socket.gethostname(), line.partition("output_dir ")[2].split(" ")[0]
    assert line.endswith(said.format(host=host, file=file))
    assert "Traceback" not in "".join(got["said"])


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_disks_of_their_own_are_told_apart(found: dict[str, Any]) -> None:
    got = found["disks of their own"]
    assert got["codes"] == [2, 2]
    for said in got["said"]:
        (line,) = said.strip().splitlines()
        assert line.startswith("fastrank train: error: resume_from_checkpoint: ")
        assert "process 0 on" in line and "has checkpoint-1, checkpoint-2;" in line
        assert "process 1 on" in line and "has none;" in line


def _resolved(value: object, folders: list[Path], checksums: list[bool]) -> list[Any]:
    """What processes with these folders agree on: paths, or errors."""
    barrier = threading.Barrier(len(folders), timeout=20)
    given: list[Any] = [None] * len(folders)
    results: list[Any] = [None] * len(folders)

    def gatherer(rank: int) -> Callable[[list[Any]], list[Any]]:
        def gather(items: list[Any]) -> list[Any]:
            given[rank] = copy.deepcopy(items)  # another process never sees what is changed later
            barrier.wait()
            everything = [item for items in given for item in items]
            barrier.wait()
            return everything

        return gather

    def resolve(rank: int) -> None:
        named = value if value in (True, "auto") else str(folders[rank] / str(value))
        try:
            results[rank] = checkpoint.resolve_resume(
                named, folders[rank], checksums=checksums[rank], gather=gatherer(rank)
            )
        except InputError as error:
            results[rank] = str(error)

    threads = [threading.Thread(target=resolve, args=(rank,)) for rank in range(len(folders))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def _publish(run: Path, *steps: int) -> None:
    for step in steps:
        staged = checkpoint.begin_staging(run, ".staging-x") / checkpoint.checkpoint_name(step)
        staged.mkdir()
        (staged / "weights").write_bytes(b"0123456789")
        checkpoint.publish(staged, run, {}, {})


def _spoil(file: Path) -> None:
    file.write_bytes(b"0123456780")  # of the same size


def test_processes_agree_on_a_checkpoint(tmp_path: Path) -> None:
    one, other = folders = [tmp_path / "one", tmp_path / "other"]
    first = [True, False]
    assert _resolved("auto", folders, first) == [None, None]
    assert all("one holds no checkpoint" in e for e in _resolved(True, [one, one], first))
    _publish(one, 2, 4, 10)
    for wanted in (True, "checkpoint-4"):
        for error in _resolved(wanted, folders, first):
            assert "resume_from_checkpoint: " in error and "\n" not in error
            assert "process 1 on " in error
    _publish(other, 2, 4)  # killed before it had written the last one
    assert _resolved(True, folders, first) == [one / "checkpoint-4", other / "checkpoint-4"]
    assert _resolved("checkpoint-2", folders, first) == [run / "checkpoint-2" for run in folders]
    _spoil(other / "checkpoint-4" / "weights")
    assert _resolved(True, folders, first) == [one / "checkpoint-4", other / "checkpoint-4"]
    assert _resolved(True, folders, [True, True]) == [run / "checkpoint-2" for run in folders]
    for error in _resolved("checkpoint-4", folders, [True, True]):
        assert "the bytes of weights are not those" in error and "process 1 on " in error
    _spoil(one / "checkpoint-2" / "weights")
    for error in _resolved(True, folders, [True, True]):
        assert "process 0 on" in error and "has checkpoint-4, checkpoint-10;" in error
        assert "process 1 on" in error and "has checkpoint-2;" in error
