"""What a user got wrong.

The library's functions raise ``ValueError`` and ``TypeError``. Whatever reads a user's files,
models and options raises `InputError`, whose text is one line; the command line prints that line
and exits with 2, and lets every other exception through as the defect it is.
"""

from __future__ import annotations


class InputError(ValueError):
    """A file, model, option or environment that cannot be used. The text is one line:
    what it is about, what was expected, what came."""
