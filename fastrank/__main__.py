"""``python -m fastrank``: the same as ``fastrank``, for launchers that start a module."""

from __future__ import annotations

import sys

from fastrank.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
