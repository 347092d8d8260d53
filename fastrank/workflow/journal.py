"""Work that survives a kill: finished units are appended to a file beside the output.

``OUTPUT.partial`` holds one JSON line per finished unit, after a first line that identifies the run
(its options, data, models). A run that is killed leaves whole lines and at most one torn
one, which is cut off at the next start. The output itself is written at the very end, under its own
name only when it is whole, and the partial file goes away after it. The alternative, a growing
output file, would leave something that looks finished and is not.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

from fastrank.data.locks import locked
from fastrank.errors import InputError
from fastrank.options.paths import local_path

#: Seconds between two flushes to the disk. A killed process loses nothing either way; a machine
#: that loses power loses at most this much work.
_SYNC_EVERY = 1.0


def journal_path(output: Path) -> Path:
    """The file beside ``output`` with the units of a run that was stopped."""
    return output.with_name(output.name + ".partial")


class Journal:
    """The finished units of one run, by key; a context manager that ends when the output is there.

    Args:
        output: the file that the run will write; the journal lies beside it.
        plan: what the units depend on, as JSON types. A journal with another plan is refused.
        discard: forget an earlier run's units.
        lenient: keys of ``plan`` that may differ from the earlier run's.

    Raises:
        InputError: the journal of a different run, one that is damaged, or one in use.
    """

    def __init__(
        self,
        output: str | Path,
        plan: Mapping[str, Any],
        *,
        discard: bool = False,
        lenient: tuple[str, ...] = (),
    ) -> None:
        target = local_path(output)
        self.path = journal_path(target)
        self.finished: dict[str, Any] = {}
        with ExitStack() as stack:
            lock = target.with_name(f".{target.name}.lock")
            stack.enter_context(locked(lock, str(self.path), again=False))
            self._file: BinaryIO = stack.enter_context(self.path.open("a+b"))
            if discard:
                self._file.truncate(0)
            self._read(json.loads(json.dumps(plan)), lenient)
            self._open = stack.pop_all()
        self.num_resumed = len(self.finished)
        self._synced = time.monotonic()

    def _read(self, plan: dict[str, Any], lenient: tuple[str, ...]) -> None:
        self._file.seek(0)
        whole = 0
        for number, line in enumerate(self._file):
            value = _parse(line)
            if value is None:
                if self._file.read(1):  # something follows, so no write was cut off here
                    raise InputError(f"{self.path}: line {number + 1} is damaged; remove the file")
                break
            if number:
                self.finished[value["key"]] = value["value"]
            else:
                self._check_plan(value.get("plan", {}), plan, lenient)
            whole += len(line)
        self._file.truncate(whole)
        self._file.seek(0, os.SEEK_END)
        if not whole:
            self._write({"plan": plan})

    def _check_plan(
        self, before: dict[str, Any], now: dict[str, Any], lenient: tuple[str, ...]
    ) -> None:
        for key in now:
            if key not in lenient and before.get(key) != now[key]:
                raise InputError(
                    f"{self.path}: unfinished work of a run with another {key}; finish that run, "
                    "or pass --partial discard"
                )

    def append(self, key: str, value: Any) -> None:
        """Record a finished unit; ``value`` is JSON types."""
        self._write({"key": key, "value": value})
        self.finished[key] = value

    def _write(self, value: dict[str, Any]) -> None:
        self._file.write(json.dumps(value, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        if time.monotonic() - getattr(self, "_synced", 0.0) > _SYNC_EVERY:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """Close the file, and remove it if the work has come to its end (the output, published
        within this context, is there) or has not begun."""
        if error is None or not self.finished:
            self.path.unlink(missing_ok=True)
        self._open.close()


def _parse(line: bytes) -> dict[str, Any] | None:
    """A line's object, or None if it is not whole."""
    if not line.endswith(b"\n"):
        return None
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
