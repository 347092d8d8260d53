"""A reward written in Python: ``FILE.py:function``, called as ``function(prompt, response)``.

The file is the user's own program and is run as such, once; this is the only place where fastrank
runs code that it is pointed to. The function gets the prompt as the record has it (text, or a list
of ``{"role", "content"}`` messages) and the response's text, and returns a finite number.
"""

from __future__ import annotations

import importlib.util
import math
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastrank.data.fields import Prompt
from fastrank.data.files import one_line
from fastrank.errors import InputError


def is_function(reward: str) -> bool:
    """Whether a reward is given as ``FILE.py:function`` and not as a model's path."""
    return reward.split(":")[0].endswith(".py")


class RewardFunction:
    """The function that ``FILE.py:function`` names.

    Raises:
        InputError: no such file or function, or the file cannot be run.
    """

    def __init__(self, reward: str) -> None:
        file, _, name = reward.rpartition(":")
        if not file:
            file, name = name, ""
        if not name.isidentifier():
            raise InputError(f"reward must be FILE.py:function, got '{one_line(reward, 80)}'")
        self.path = Path(file).expanduser()
        if not self.path.is_file():
            raise InputError(f"{file}: no such reward file")
        self.name = f"{self.path.name}:{name}"
        function = getattr(_load(self.path), name, None)
        if not callable(function):
            raise InputError(f"{file}: no function '{name}' in it")
        self._function: Callable[[Any, str], Any] = function

    def __call__(self, prompt: Prompt, response: str, where: str) -> float:
        """The reward of one response; ``where`` names it in messages.

        Raises:
            InputError: the function raises, or returns something else than a finite number.
        """
        try:
            value = self._function(prompt, response)
        except Exception as error:  # the function is the user's: anything may come out of it
            line = _line_in(self.path, error)
            said = f"{type(error).__name__}: {one_line(error)}" if str(error) else repr(error)
            raise InputError(f"{where}: {self.name} raised {said}{line}") from error
        number = _as_float(value)
        if number is None or not math.isfinite(number):
            got = one_line(repr(value), 60)
            raise InputError(f"{where}: {self.name} returned {got}, expected a finite number")
        return number


def _load(path: Path) -> Any:
    """Run the file as a module of its own; its folder is importable, as for a script."""
    spec = importlib.util.spec_from_file_location(f"_fastrank_reward_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the file is the user's: anything may come out of it
        line = _line_in(path, error)
        raise InputError(f"{path}: {type(error).__name__}: {one_line(error)}{line}") from error
    return module


def _line_in(path: Path, error: Exception) -> str:
    """Where in the user's file it happened."""
    here = str(path.resolve())
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if Path(frame.filename).resolve().as_posix() == Path(here).as_posix():
            return f" (line {frame.lineno})"
    return ""


def _as_float(value: Any) -> float | None:
    if isinstance(value, str):
        return None
    try:
        return float(value)  # numbers, numpy scalars, tensors of one element
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None
