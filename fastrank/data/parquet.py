"""Parquet files, read in a limited process of their own and handed on as JSON lines.

The format's library is large native code, which a damaged or hostile file can crash or send after
memory that the machine does not have, and the training run with it. Here that costs only a process
that limits itself before it opens the file; what it hands on is text. Reading in this process would
be about a quarter of a second faster to start; the conversion runs beside it, so that a large file
is read about as fast as JSON lines are.

This file is also the program of that process, started by its path, so it imports the standard
library alone. Arguments: the file, the share to read and the number of shares, the bytes of memory
to allow beyond those in use after the imports, the seconds of processor time to allow per batch,
and the parent's import path as JSON. It writes the number of the first row, then a row per line.
Exit status 0: all rows are written. `FAILED`: the last line on stderr says why not. A signal:
crashed or out of time.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

#: Memory of the reading process beyond its libraries and the size of the file.
MEMORY = 384 << 20
#: Processor time for a batch of rows, by far more than any takes.
SECONDS = 30

FAILED = 3
BATCH_ROWS = 256

#: What the reading process runs.
PROGRAM = __file__


class UnreadableError(Exception):
    """A Parquet file that is damaged, crashes its library or needs too much memory or time."""


def parquet_lines(path: Path, part: int = 0, parts: int = 1) -> Iterator[tuple[int, bytes]]:
    """The rows of one of ``parts`` shares of a file, as (number from 1, JSON object).

    A share is some consecutive row groups.

    Raises:
        UnreadableError: when that point is reached; the limits are `MEMORY` plus the file's size,
            and `SECONDS`.
    """
    limits = (str(MEMORY + path.stat().st_size), str(SECONDS))
    command = [sys.executable, "-I", PROGRAM, str(path.absolute()), str(part), str(parts), *limits]
    # Allocators that reserve address space ahead would take the limit for themselves.
    environment = os.environ | {"ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "1"}
    with (
        tempfile.TemporaryFile() as messages,
        subprocess.Popen(
            [*command, json.dumps(sys.path)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=messages,
            env=environment,
        ) as child,
    ):
        assert child.stdout is not None
        try:
            first = child.stdout.readline()
            if first:
                yield from enumerate(child.stdout, int(first))
            status = child.wait()
        finally:  # also when nobody wants the rest
            child.kill()
        if status:
            messages.seek(0)
            said = messages.read().decode("utf-8", "replace").strip()
            raise UnreadableError(_reason(status, said))


def _reason(status: int, said: str) -> str:
    if status == FAILED and said:
        return said.splitlines()[-1]
    if status < 0:
        try:
            ended = signal.Signals(-status).name
        except ValueError:
            ended = f"signal {-status}"
        if ended == "SIGXCPU":
            return f"reading took more than {SECONDS} s of processor time for a batch of rows"
        return f"it crashed the library that reads it ({ended})"
    return f"the process that read it failed with status {status}"


# ---- in the reading process --------------------------------------------------------------------


def main() -> int:
    path, part, parts, memory, seconds, import_path = sys.argv[1:]
    sys.path[:] = json.loads(import_path)
    import pyarrow
    import pyarrow.parquet

    pyarrow.set_io_thread_count(1)
    limit_memory(int(memory))
    limit_time(int(seconds))
    try:
        # Buffered column streams: a row group is decoded as it is read and never held whole.
        with (
            pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file,
            open(1, "wb", buffering=1 << 18, closefd=False) as out,
        ):
            total = file.num_row_groups
            begin, end = (total * k // int(parts) for k in (int(part), int(part) + 1))
            before = sum(file.metadata.row_group(k).num_rows for k in range(begin))
            out.write(b"%d\n" % (before + 1))
            for batch in file.iter_batches(BATCH_ROWS, range(begin, end), use_threads=False):
                for row in batch.to_pylist():
                    line = json.dumps(row, ensure_ascii=False, default=plain)
                    out.write(line.encode() + b"\n")
                limit_time(int(seconds))
    except BrokenPipeError:  # the reader wants no more
        return 0
    except (MemoryError, pyarrow.ArrowMemoryError):
        print(f"it needs more than {int(memory) >> 20} MiB for a batch of rows", file=sys.stderr)
        return FAILED
    except Exception as error:  # the library and its converters raise dozens of unrelated types
        text = " ".join(str(error).split()) or type(error).__name__
        print(text, file=sys.stderr)
        return FAILED
    return 0


def plain(value: Any) -> Any:
    """What JSON lacks: text in binary columns, decimals; other binary values keep their size."""
    from decimal import Decimal

    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return {"bytes": len(value)}
    return float(value) if isinstance(value, Decimal) else str(value)


def limit_memory(extra: int) -> None:
    """Allow ``extra`` bytes of address space beyond those in use (where the system can tell)."""
    try:
        import resource

        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
    except (ImportError, OSError):  # Windows; macOS, which does not keep to the limit anyway
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = used + extra
    if hard == resource.RLIM_INFINITY or wanted < hard:
        resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))


def limit_time(seconds: int) -> None:
    """Allow ``seconds`` of processor time from now on; beyond them the system ends the process."""
    try:
        import resource
    except ImportError:  # Windows
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    wanted = int(used.ru_utime + used.ru_stime) + 1 + seconds
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    if hard == resource.RLIM_INFINITY or wanted < hard:
        resource.setrlimit(resource.RLIMIT_CPU, (wanted, hard))


if __name__ == "__main__":
    sys.exit(main())
