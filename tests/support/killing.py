"""Start a command in a process of its own and kill it in the middle of its work."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path


def run_until_lines(
    arguments: Sequence[str], journal: Path, lines: int, timeout: float = 240
) -> None:
    """Run ``fastrank`` and SIGKILL it as soon as ``journal`` has that many lines.

    Fails if the command ends before: the test would otherwise kill nothing.
    """
    command = [sys.executable, "-m", "fastrank.cli.main", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if journal.exists() and journal.read_bytes().count(b"\n") >= lines:
                process.send_signal(signal.SIGKILL)
                process.wait()
                assert process.returncode == -signal.SIGKILL
                assert journal.exists()
                return
            if process.poll() is not None:
                said = process.stderr.read().decode() if process.stderr else ""
                raise AssertionError(f"ended with {process.returncode} before the kill: {said}")
            time.sleep(0.005)
        raise AssertionError(f"no {lines} lines in {journal} within {timeout} s")
    finally:
        process.kill()
        process.wait()
        if process.stderr is not None:
            process.stderr.close()
