"""What ends a run although the user's input was in order."""

from __future__ import annotations


class TrainingStopped(RuntimeError):
    """Training cannot go on: numbers that are not finite, memory or disk that ran out. The text
    is one line that says what happened and what to do; the last checkpoint is good."""
