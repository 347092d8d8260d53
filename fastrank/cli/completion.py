"""Tab completion: a script for the shell, made once by shtab, so that a tab starts no Python."""

from __future__ import annotations

import argparse

from fastrank.cli.commands import COMMANDS
from fastrank.errors import InputError


def completion_script(shell: str = "bash") -> str:
    """The script with which a shell completes fastrank's commands and their options.

    Raises:
        InputError: a shell that shtab has no script for.
        ModuleNotFoundError: shtab is not installed.
    """
    import shtab

    from fastrank.cli.parser import CommandParser

    if shell not in shtab.SUPPORTED_SHELLS:
        expected = ", ".join(shtab.SUPPORTED_SHELLS)
        raise InputError(f"--print-completion must be one of {expected}, got {shell}")
    root = argparse.ArgumentParser("fastrank")
    commands = root.add_subparsers()
    for name, made in COMMANDS.items():
        command = made()
        own = CommandParser(command.options, f"fastrank {name}", command.positional)
        commands.add_parser(name, help=made.__doc__, parents=[own])
    return str(shtab.complete(root, shell=shell))
