"""``fastrank <command>``: choosing the command, and what an error looks like.

Whatever the user got wrong ends as one line on stderr and exit code 2; any other exception is a
defect and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fastrank import __version__
from fastrank.cli.commands import COMMANDS
from fastrank.cli.help import print_help, wants_help
from fastrank.console import close_bars
from fastrank.errors import (
    InputError,
    TrainingInterrupted,
    TrainingStopped,
    install_command,
)

#: Packages that come with an extra, for the line that says how to get them.
_EXTRAS = {
    "accelerate": "train",
    "bitsandbytes": "qlora",
    "datasets": "train",
    "matplotlib": "train",
    "peft": "train",
    "pyarrow": "train",
    "shtab": "completion",
    "sacrebleu": "eval",
    "xxhash": "train",
}

_INTERRUPTED = 130
_BROKEN_PIPE = 141
_PATIENCE = 6.0  # seconds; to end Python with torch takes some


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; ``argv`` defaults to the process's arguments."""
    noted: list[int] = []
    try:
        with _noting_interrupts(noted):
            return _main(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:  # another Ctrl-C, while the first one's line was being written
        return _INTERRUPTED
    except Exception as error:
        if not noted:
            raise
        _say(f"fastrank: interrupted, which ended as {type(error).__name__}")
        return _INTERRUPTED


@contextlib.contextmanager
def _noting_interrupts(noted: list[int]) -> Iterator[None]:
    """Context in which a Ctrl-C raises ``KeyboardInterrupt``, as ever, and is noted: compiled
    modules turn it into errors of their own (an ImportError while they are loaded, a TypeError
    while they convert an argument), which are no defects then."""
    default = signal.default_int_handler
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not default
    ):
        yield
        return

    def note(number: int, frame: Any) -> None:
        noted.append(number)
        default(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, default)


def _main(arguments: list[str]) -> int:
    prog = "fastrank"
    # peft imports it where it is installed; on some CPUs it asks for another package, every time.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        if arguments and arguments[0] in ("-h", "--help", "help"):
            print(_help())
            return 0
        if arguments and arguments[0] in ("--version", "-V"):
            print(f"fastrank {__version__}")
            return 0
        if arguments and arguments[0].replace("_", "-") == "--print-completion":
            from fastrank.cli.completion import completion_script

            print(completion_script(*arguments[1:2]))
            return 0
        name = _command(arguments)
        prog = f"fastrank {name}"
        wanted = wants_help(arguments[1:])
        if wanted is not None:
            print_help(name, COMMANDS[name], everything=wanted == "all")
            return 0
        return COMMANDS[name]()(arguments[1:], prog)
    except InputError as error:
        return _fail(prog, str(error))
    except TrainingStopped as error:
        _say(f"{prog}: stopped: {error}")
        return 1
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        extra = _EXTRAS.get(package)
        if extra is None:
            raise
        return _fail(prog, f"needs {package}: {install_command(extra)}")
    except TrainingInterrupted as stop:
        if stop.is_first:
            print(f"{prog}: {stop}; to go on: {_going_on(arguments)}", file=sys.stderr)
        return 128 + stop.signum
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except SystemExit as stop:  # of a program that the command runs: nothing here calls it
        return _fail(prog, f"ended by sys.exit({stop.code!r}) before it was done")
    except BrokenPipeError:  # the reader of our output has gone; leave Python nothing to flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except OSError as error:  # a full disk, a folder that may not be read
        where = f"{error.filename}: " if error.filename else ""
        return _fail(prog, f"{where}{error.strerror or error}")
    finally:
        close_bars()


def _fail(prog: str, message: str) -> int:
    _say(f"{prog}: error: {' '.join(message.split())}")
    return 2


def _say(line: str) -> None:
    """Print an error. Where all processes that a launcher started on this machine have it, the
    first one's end makes the launcher end the others, which wait for that with theirs."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(_PATIENCE)
    print(line, file=sys.stderr, flush=True)


def _going_on(arguments: Sequence[str]) -> str:
    """The command that goes on with an interrupted run."""
    rest, name = list(arguments), "--resume_from_checkpoint"
    if rest[0] == "train":  # the other commands go on by themselves
        for i in reversed(range(len(rest))):
            option, given, _ = rest[i].partition("=")
            if option.replace("-", "_").lstrip("_") == name.lstrip("-"):
                has_value = not given and not "".join(rest[i + 1 : i + 2]).startswith("-")
                del rest[i : i + 1 + has_value]
        rest += [name, "true"]
    own = Path(sys.argv[0])
    prog = "python -m fastrank" if own.stem in ("main", "__main__") else own.name
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    launcher = f" (started as before, on {processes} processes)" if processes > 1 else ""
    return f"{prog} {shlex.join(rest)}{launcher}"


def _command(arguments: Sequence[str]) -> str:
    if not arguments:
        raise InputError(f"expected a command: {', '.join(COMMANDS)} (or --help)")
    name = arguments[0]
    if name in COMMANDS:
        return name
    kind = "option" if name.startswith("-") else "command"
    near = difflib.get_close_matches(name, COMMANDS, 1)
    hint = f", did you mean {near[0]}?" if near else f"; commands: {', '.join(COMMANDS)}"
    raise InputError(f"unknown {kind} {name[:60]}{hint}")


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = ["usage: fastrank <command> [options]", "", "commands:"]
    lines += [f"  {name:{width}}  {made.__doc__}" for name, made in COMMANDS.items()]
    lines += [
        "",
        "options:",
        "  --help     this text; fastrank <command> --help lists a command's options",
        "  --version  the installed version",
        "  --print-completion SHELL  a script for bash, zsh or tcsh that completes commands and",
        "             options (needs shtab)",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
