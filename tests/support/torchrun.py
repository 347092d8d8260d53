"""Start a script in several processes, as users do, once for all of pytest's processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[2]


def command(nproc: int, *arguments: str) -> list[str]:
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc_per_node", str(nproc), *arguments),
    ]


def environment() -> dict[str, str]:
    """This environment, with the code under test before whatever else can be imported in it."""
    own = [str(ROOT / name) for name in ("", "kernels/torch-ext", "tests/support")]
    path = os.pathsep.join([*own, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def torchrun(nproc: int, *arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run to the end; fails with the output if the exit code is not 0."""
    done = subprocess.run(
        command(nproc, *arguments),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done


def filled_once(factory: pytest.TempPathFactory, name: str, fill: Callable[[Path], object]) -> Path:
    """A temporary folder that the first of pytest's processes fills and the others read."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            partial = folder.with_suffix(".partial")
            partial.mkdir()
            fill(partial)
            partial.rename(folder)
    return folder
