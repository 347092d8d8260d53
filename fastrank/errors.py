"""Exceptions whose text is one line for the user.

The library's functions raise ``ValueError`` and ``TypeError``. Whatever reads a user's files,
models and options raises `InputError`, whose text is one line; the command line prints that line
and exits with 2, and lets every other exception through as the defect it is.
"""

from __future__ import annotations

from pathlib import Path

#: The name to install: on PyPI, ``fastrank`` is another library.
DISTRIBUTION = "fastrank-lm"


def install_command(extra: str) -> str:
    """Command that installs what an extra brings.

    >>> install_command("train")
    "pip install 'fastrank-lm[train]'"
    """
    return f"pip install '{DISTRIBUTION}[{extra}]'"


def one_line(error: object, limit: int = 200) -> str:
    """The first line of an error's or a value's text, shortened, without control characters."""
    text = " ".join(str(error).split())
    text = "".join(c if c.isprintable() else "�" for c in text)
    return text if len(text) <= limit else text[: limit - 1] + "…"


class InputError(ValueError):
    """A file, model, option or environment that cannot be used. The text is one line that names
    it, the expected and the given value."""


class TrainingStopped(RuntimeError):
    """An unrecoverable training error: numbers that are not finite, memory or disk that ran out.
    The text is one line that says what happened and what to do; the last checkpoint is good."""


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM has ended training after a whole step, and a checkpoint of that step holds
    the run. The text is one line that names both. A program that knows of no interruptions ends
    here, as it would without the checkpoint.

    Attributes:
        signum: the signal.
        checkpoint: the folder to go on from.
        is_first: whether this is the process that speaks for all of a run.
    """

    def __init__(self, text: str, *, signum: int, checkpoint: Path, is_first: bool) -> None:
        super().__init__(text)
        self.signum = signum
        self.checkpoint = checkpoint
        self.is_first = is_first
