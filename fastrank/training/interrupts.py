"""Ctrl-C and SIGTERM during training: the step is finished, a checkpoint is saved, the run ends.

A signal that raises in the middle of a step, as Python's own handler does, loses the steps since
the last checkpoint, and in a run on several processes leaves the others inside a collective
operation. So handlers only note the signal, and all processes agree on the step after which they
stop. Whoever cannot wait for that asks a second time.

Launchers pass signals on, and some send them twice (``timeout`` does, to the process and to its
group): what comes within a second of the first is no second request.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastrank.console import close_bars

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_TOGETHER = 1.0  # seconds within which signals are one request

_exits = False


@contextlib.contextmanager
def exiting_at_second_signal() -> Iterator[None]:
    """Context of a command: the second signal ends the process, whatever it is doing; elsewhere it
    raises ``KeyboardInterrupt``, as the first does outside of training."""
    global _exits
    _exits = True
    try:
        yield
    finally:
        _exits = False


class Interruption(TrainerCallback):
    """Stops a run after the step in which a signal came.

    Attributes:
        requested: the signal that this process has received, or 0.
        agreed: the signal for which all processes stop after the step at hand, or 0.
    """

    def __init__(self, *, alone: bool) -> None:
        """``alone``: whether there are no other processes to agree with."""
        self.alone = alone
        self.requested = 0
        self.agreed = 0
        self._since = 0.0
        self._pid = 0

    @contextlib.contextmanager
    def watching(self, *, says: bool) -> Iterator[None]:
        """Context of training: receives the signals, in the main thread of a program; elsewhere
        they stay as they are.

        A signal that came after the last step is passed on at the end to whoever had it before.

        Args:
            says: whether this process tells of the first signal.
        """
        self.requested = self.agreed = 0
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._pid, self._says = os.getpid(), says
        before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if self.requested and not self.agreed:
            signal.raise_signal(self.requested)

    def _receive(self, number: int, frame: Any) -> None:
        if os.getpid() != self._pid:  # a forked child, which ends with its parent
            if number != signal.SIGINT:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            return
        now = time.monotonic()
        if not self.requested:
            self.requested, self._since = number, now
            if self._says:
                _say(
                    f"{signal.Signals(number).name}: finishing the step and saving a checkpoint; "
                    "a second one leaves at once"
                )
        elif now - self._since > _TOGETHER:
            if _exits:
                with contextlib.suppress(Exception):
                    close_bars()  # which hide the terminal's cursor
                _say("left without a checkpoint of this step")
                os._exit(128 + number)
            raise KeyboardInterrupt

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.alone:
            self.agreed = self.requested
        if self.agreed:
            control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Trainer takes every end of its loop for the end of an epoch, with an evaluation there.
        whole = state.global_step >= state.max_steps or float(state.epoch or 0.0).is_integer()
        if self.agreed and not whole:
            control.should_log = control.should_evaluate = control.should_save = False


def _say(text: str) -> None:
    """Write to stderr itself: a handler may have come in the middle of Python's own writing."""
    with contextlib.suppress(OSError):
        os.write(2, f"\nfastrank: {text}\n".encode())
