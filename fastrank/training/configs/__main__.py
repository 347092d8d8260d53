"""``python -m fastrank.training.configs NAME`` prints the path of a launcher configuration."""

from __future__ import annotations

import sys

from fastrank.errors import InputError
from fastrank.training.configs import names, path


def main(argv: list[str]) -> int:
    if len(argv) != 1 or argv[0] in ("-h", "--help"):
        print(f"usage: python -m fastrank.training.configs {{{','.join(names())}}}")
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    try:
        print(path(argv[0]))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
