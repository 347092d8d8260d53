"""What people see on a terminal: colour and progress bars, by rich.

Where stdout is no terminal, text is plain; where stderr is none, bars say nothing. A bar has no
thread of its own: processes are forked while one is shown.
"""

from __future__ import annotations

import atexit
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

_REFRESH_SECONDS = 0.1


def stdout() -> Console:
    """Console on stdout as it is now; text is printed as given, without markup."""
    from rich.console import Console

    return Console(file=sys.stdout, markup=False, highlight=False, emoji=False)


def say(text: str, style: str = "") -> None:
    """Print text on stdout, above a bar if there is one; in a style of rich on a terminal."""
    if style and sys.stdout.isatty():
        stdout().print(text, style=style, soft_wrap=True)
    else:
        print(text, flush=True)


class Bar:
    """A progress bar on stderr with the time that is left; nothing where stderr is no terminal.

    Bars may be nested, and ``print`` writes above them. The signature is that of tqdm.

    Args:
        iterable: what to go through, if the bar is iterated over.
        desc: label.
        total: number of units; None where it is not known.
        initial: units done before.
        unit: of the count.
        disable: show nothing.

    Example::

        with Bar(desc="sampling", total=100, unit="prompts") as bar:
            bar.update(16)
    """

    def __init__(
        self,
        iterable: Iterable[Any] = (),
        *,
        desc: str = "",
        total: float | None = None,
        initial: float = 0,
        unit: str = "",
        disable: bool = False,
    ) -> None:
        self._items = iterable
        if total is None and isinstance(iterable, Sized) and len(iterable):
            total = len(iterable)
        self.shown = not disable and sys.stderr.isatty()
        if self.shown:
            self._task = _Display.show(desc, total, initial, unit)

    def update(self, count: float = 1) -> None:
        """Add to what is done."""
        if self.shown:
            _Display.advance(self._task, count)

    def describe(self, text: str) -> None:
        """Replace the label."""
        if self.shown:
            _Display.describe(self._task, text)

    def close(self) -> None:
        """Remove the bar."""
        if self.shown:
            self.shown = False
            _Display.hide(self._task)

    def __iter__(self) -> Iterator[Any]:
        with self:
            for item in self._items:
                yield item
                self.update()

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _Display:
    """The one live display of the process, which holds all bars."""

    progress: Progress | None = None
    drawn = 0.0

    @classmethod
    def show(cls, desc: str, total: float | None, initial: float, unit: str) -> Any:
        if cls.progress is None:
            cls.progress = _progress()
            cls.progress.start()
            cls.progress.console.show_cursor(True)  # a process that is killed cannot bring it back
        of = "" if total is None else f"/{total:,.0f}"
        task = cls.progress.add_task(desc, total=total, completed=int(initial), unit=unit, of=of)
        cls.progress.refresh()
        return task

    @classmethod
    def advance(cls, task: Any, count: float) -> None:
        if cls.progress is not None:
            cls.progress.advance(task, count)
            cls._redraw()

    @classmethod
    def describe(cls, task: Any, text: str) -> None:
        if cls.progress is not None:
            cls.progress.update(task, description=text)
            cls._redraw()

    @classmethod
    def _redraw(cls) -> None:
        now = time.monotonic()
        if cls.progress is not None and now - cls.drawn >= _REFRESH_SECONDS:
            cls.drawn = now
            cls.progress.refresh()

    @classmethod
    def hide(cls, task: Any) -> None:
        if cls.progress is not None and task in cls.progress.task_ids:
            cls.progress.remove_task(task)
            if not cls.progress.tasks:
                cls.stop()

    @classmethod
    def stop(cls) -> None:
        if cls.progress is not None:
            cls.progress.stop()
            cls.progress = None


def close_bars() -> None:
    """Remove every bar that is still shown, as when an error ended the work that it counted."""
    _Display.stop()


atexit.register(close_bars)


def _progress() -> Progress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        TextColumn("{task.completed:,.0f}{task.fields[of]} {task.fields[unit]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(file=sys.stderr, markup=False, highlight=False, emoji=False),
        auto_refresh=False,
        transient=True,
        redirect_stdout=sys.stdout.isatty(),
    )
