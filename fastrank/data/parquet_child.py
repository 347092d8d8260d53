"""Parquet to JSON lines in a process of its own; run by `fastrank.data.parquet`, never imported.

The format's library is large native code, which a hostile file can crash or send after memory that
the machine does not have. Here that costs this process alone: it limits itself before it opens the
file, and what it hands on is text, which the reading process parses with Python's own parser.

Arguments: the file, the bytes of memory to allow beyond those in use after the imports, the seconds
of processor time to allow for each batch, and the parent's import path as JSON. Exit status 0: all
rows are written. `FAILED`: the last line on stderr says why not. A signal: crashed or out of time.
"""

from __future__ import annotations

import json
import sys
from typing import Any

FAILED = 3
BATCH_ROWS = 256


def main() -> int:
    path, memory, seconds, import_path = sys.argv[1:]
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
            for batch in file.iter_batches(batch_size=BATCH_ROWS, use_threads=False):
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
