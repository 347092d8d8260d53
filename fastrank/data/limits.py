"""Limits on what programs and patterns of others may take: time and memory."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

from fastrank.errors import InputError

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

_PAGES = Path("/proc/self/statm")


class _OutOfTimeError(BaseException):
    """No ``Exception``: what runs may catch those."""


@contextlib.contextmanager
def bounded(what: str, *, seconds: float = 10.0, memory: int = 2 << 30) -> Iterator[None]:
    """Context that ends what takes longer than ``seconds``, or ``memory`` bytes more than the
    process has (on Linux). In the main thread alone, where signals arrive; elsewhere it does
    nothing.

    Raises:
        InputError: ``what`` took more.
    """
    if threading.current_thread() is not threading.main_thread() or resource is None:
        yield
        return

    def out_of_time(signum: int, frame: object) -> None:
        raise _OutOfTimeError

    alarm = (0.0, 0.0)
    before = resource.getrlimit(resource.RLIMIT_AS)
    others = signal.signal(signal.SIGALRM, out_of_time)
    try:
        with contextlib.suppress(OSError, ValueError):  # no /proc, a limit that is lower already
            size = int(_PAGES.read_text().split()[0]) * resource.getpagesize()
            own = size + memory if before[0] < 0 else min(before[0], size + memory)
            resource.setrlimit(resource.RLIMIT_AS, (own, before[1]))
        alarm = signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    except _OutOfTimeError:
        raise InputError(f"{what} took more than {seconds:g} s") from None
    except MemoryError:
        raise InputError(f"{what} took more than {memory / (1 << 30):g} GiB of memory") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, others)
        signal.setitimer(signal.ITIMER_REAL, *alarm)
        resource.setrlimit(resource.RLIMIT_AS, before)
