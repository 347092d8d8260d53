"""Bars: with the time left on a terminal, nothing elsewhere, never in the way of what is said."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from fastrank.console import Bar, say

NESTED = """
import sys
from fastrank.console import Bar, close_bars
with Bar(desc="outer", total=4, initial=1, unit="steps") as bar:
    bar.update(2)
    for item in Bar([1, 2], desc="inner"):
        print("said", item)
    bar.describe("[b]renamed")
    import time; time.sleep(0.2); bar.update(0)
left = Bar(desc="left over", total=1)
close_bars()
left.update(); left.close()
print(1, sys.stdout.isatty(), type(sys.stdout).__name__)
"""


def on_terminal(code: str, stdout: int | None = None) -> tuple[str, str]:
    """What a program writes to a terminal, and to a pipe if that is its stdout."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=theirs if stdout is None else stdout,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "100"},
        text=True,
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 1 << 16)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        shown += piece
    os.close(ours)
    piped = process.stdout.read() if process.stdout is not None else ""
    assert process.wait() == 0, shown.decode()
    return shown.decode(), piped


def test_bars_on_a_terminal() -> None:
    shown, _ = on_terminal(NESTED)
    assert "outer" in shown and "3/4 steps" in shown and "inner" in shown and "left over" in shown
    assert "[b]renamed" in shown and "said 1\r\n" in shown
    assert shown.endswith("1 True TextIOWrapper\r\n") and "\x1b[?25h" in shown


def test_a_pipe_gets_what_is_said_while_the_terminal_has_the_bar() -> None:
    shown, piped = on_terminal(NESTED, subprocess.PIPE)
    assert piped == "said 1\nsaid 2\n1 False TextIOWrapper\n"
    assert "3/4 steps" in shown and "said" not in shown


def test_nothing_is_shown_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    with Bar(desc="a bar", total=3) as bar:
        bar.update()
        bar.describe("b")
        say("[bold]text", "bold")
    assert list(Bar(range(3), desc="c")) == [0, 1, 2]
    assert capsys.readouterr() == ("[bold]text\n", "")


def test_a_command_on_a_terminal_ends_with_its_json(tmp_path: Path, story_model_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    record = {"prompt": "Once", "responses": [" upon", " a"], "scores": [1, 0]}
    file.write_text(json.dumps(record) + "\n")
    argv = ["score", "--model", str(story_model_path), "--data", str(file), "--json"]
    code = f"import sys; from fastrank.cli.main import main; sys.exit(main({argv}))"
    shown, _ = on_terminal(code)
    assert "scoring" in shown
    assert json.loads(shown.splitlines()[-1])["responses_scored"] == 2
