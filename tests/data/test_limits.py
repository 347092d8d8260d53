"""Limits of time and memory on programs and patterns of others, and on what JSON becomes."""

from __future__ import annotations

import re
import signal
import threading
from pathlib import Path

import pytest

from fastrank.data import files, rows
from fastrank.data.limits import bounded
from fastrank.data.render import apply_template
from fastrank.errors import InputError
from fastrank.tasks.menu import word_tokenizer

resource = pytest.importorskip("resource")
SAID = [[{"role": "user", "content": "hello"}]]


def state() -> tuple[object, ...]:
    limits = resource.getrlimit(resource.RLIMIT_AS)
    return limits, signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)[0] > 0


def test_what_takes_too_long_ends_and_leaves_the_process_as_it_was() -> None:
    before = state()
    with pytest.raises(InputError, match=r"^the pattern took more than 0.2 s$"):
        with bounded("the pattern", seconds=0.2):
            re.fullmatch("(a+)+", "a" * 60 + "b")
    assert state() == before
    with pytest.raises(KeyError), bounded("an error", seconds=5):
        raise KeyError("of its own")
    with bounded("nothing", seconds=5):
        pass
    assert state() == before


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_what_takes_too_much_memory_ends() -> None:
    before = state()
    with pytest.raises(InputError, match=r"^the text took more than 0.25 GiB of memory$"):
        with bounded("the text", memory=1 << 28):
            len("a" * (1 << 30))
    assert state() == before and len("a" * (1 << 29)) == 1 << 29


def test_an_alarm_of_somebody_else_stays() -> None:
    signal.setitimer(signal.ITIMER_REAL, 1000)
    try:
        with bounded("nothing", seconds=5):
            pass
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 900
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def test_another_thread_has_no_limits() -> None:
    found: list[int] = []

    def run() -> None:
        with bounded("nothing", seconds=5):
            found.append(1)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [1]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", " s$"),
        ("{% set x = 2**1000000000 %}", " s$"),
        ("{{ 'a' * 10**10 }}", " GiB of memory$"),
        ("{% set x = 'a' * 10**6 %}{% for i in range(9999) %}{{ x }}{% endfor %}", " of memory$"),
    ],
)
def test_chat_templates_without_end(
    template: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounded.__wrapped__, "__kwdefaults__", {"seconds": 0.5, "memory": 1 << 28})
    tokenizer = word_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(InputError, match=rf"^the chat template, for one record, took .*{said}"):
        apply_template(tokenizer, SAID, None, generate=False)
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert apply_template(tokenizer, SAID, None, generate=False) == ["hello"]


def test_json_that_would_become_far_more_than_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line of empty objects; texts of the same size are read."""
    monkeypatch.setattr(rows, "MOST_OBJECTS", 1 << 24)
    objects = '{"responses": [' + "{}," * (2 << 20) + "{}]}"
    text = '{"prompt": "' + "a, [b] {c} " * (1 << 19) + '"}'
    for name, content in (("d.jsonl", objects), ("d.json", f"[{objects}]")):
        (tmp_path / name).write_text(content + "\n")
        with pytest.raises(InputError, match=r"6 MiB would become about \d+ MiB of lists and obj"):
            list(files.read_rows(tmp_path / name))
    monkeypatch.undo()
    (tmp_path / "text.jsonl").write_text(text + "\n")
    assert len(list(files.read_rows(tmp_path / "text.jsonl"))) == 1
