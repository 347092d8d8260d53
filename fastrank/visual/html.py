"""A page in one file: style and script inside, nothing fetched, every text escaped.

The page's own policy forbids any script but the one below, by its checksum, so that a text that
slipped through would still not run.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from fastrank.data.write import atomic_path

__all__ = ["escape", "is_page", "table", "write_page"]

_MARK = '<meta name="generator" content="fastrank">'


def write_page(path: str | Path, title: str, body: Iterable[str]) -> Path:
    """Write a page; ``body`` is HTML. The file is replaced when it is complete."""
    style, script = (
        files(__package__).joinpath(name).read_text(encoding="utf-8")
        for name in ("page.css", "page.js")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    text = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'{_MARK}<meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{style}</style></head>\n"
        f"<body><main><h1>{escape(title)}</h1>\n" + "\n".join(body) + "\n</main>"
        f"<script>{script}</script></body></html>\n"
    )
    with atomic_path(path) as partial:
        # A lone surrogate has no UTF-8; a browser shows what stands for it.
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
    return Path(path)


def is_page(path: Path) -> bool:
    """Whether a file is a page of `write_page`, so that nothing is lost when it is replaced."""
    with path.open(encoding="utf-8", errors="replace") as file:
        return _MARK in file.read(2000)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of texts; columns but the first are numbers."""
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    lines = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows)
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"
