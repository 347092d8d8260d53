"""Functions that users write, named as ``FILE.py:name``: rewards and losses.

The file is the user's own program and is run as such, once; this is the only place where fastrank
runs code that it is pointed to. A reward gets the prompt as the record has it (text, or a list of
``{"role", "content"}`` messages) and the response's text, and returns a finite number. A loss gets
tensors, see `fastrank.FunctionLoss`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastrank.data.fields import Prompt
from fastrank.errors import InputError, one_line
from fastrank.options.paths import local_path


def is_function(text: str) -> bool:
    """Whether an option is given as ``FILE.py:name`` and not as the name of something else."""
    return text.split(":")[0].endswith(".py")


def load_named(text: str, what: str) -> Any:
    """What ``FILE.py:name`` names; ``what`` it is for, in messages. A function comes back as one
    whose errors are `InputError` and name the line.

    Raises:
        InputError: no such file or name, or the file cannot be run.
    """
    file, _, name = text.rpartition(":")
    if not file:
        file, name = name, ""
    if not name.isidentifier():
        raise InputError(f"{what} must be FILE.py:function, got '{one_line(text, 80)}'")
    path = local_path(file)
    if not path.is_file():
        raise InputError(f"{file}: no such {what} file")
    found = getattr(_load(path, what), name, None)
    if found is None:
        raise InputError(f"{file}: no function '{name}' in it")
    if isinstance(found, type) or not callable(found):
        return found

    @functools.wraps(found)
    def explained(*args: Any, **kwargs: Any) -> Any:
        with _user_code(path, f"{path.name}:{name}"):
            return found(*args, **kwargs)

    return explained


class RewardFunction:
    """The function that ``FILE.py:function`` names.

    Raises:
        InputError: no such file or function, or the file cannot be run.
    """

    def __init__(self, reward: str) -> None:
        file, _, name = reward.rpartition(":")
        self.path = local_path(file)
        function = load_named(reward, "reward")
        self.name = f"{self.path.name}:{name}"
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
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        number = _as_float(value)
        if number is None or not math.isfinite(number):
            got = one_line(repr(value), 60)
            raise InputError(f"{where}: {self.name} returned {got}, expected a finite number")
        return number


def _load(path: Path, what: str) -> Any:
    """Run the file as a module of its own; its folder is importable, as for a script."""
    spec = importlib.util.spec_from_file_location(f"_fastrank_{what}_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    sys.modules[spec.name] = module
    with _user_code(path, str(path)):
        spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _user_code(path: Path, name: str) -> Iterator[None]:
    """Context of the user's own program: it prints to stderr, so that a result on stdout stays
    whole, and must leave the process and its working folder as they are.

    Raises:
        InputError: it raised something, tried to end the process, or changed the folder; Ctrl-C
            alone stays what it is.
    """
    folder = os.getcwd()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except KeyboardInterrupt:
        raise
    except SystemExit as stop:
        raise InputError(
            f"{name} called sys.exit({stop.code!r}){_line_in(path, stop)}, expected it to return"
        ) from stop
    except BaseException as error:  # anything may come out of it
        said = f"{type(error).__name__}: {one_line(error)}" if str(error) else repr(error)
        raise InputError(f"{name} raised {said}{_line_in(path, error)}") from error
    finally:
        after = _working_folder()
        if after != folder:
            os.chdir(folder)
    if after != folder:
        raise InputError(f"{name} changed the working folder to {after}, expected it to stay")


def _working_folder() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # it was removed
        return None


def _line_in(path: Path, error: BaseException) -> str:
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
