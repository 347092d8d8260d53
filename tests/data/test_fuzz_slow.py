"""Ten thousand damaged files: records, counted drops or one line; no hang, no bloat."""

from __future__ import annotations

import contextlib
import copy
import json
import random
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pyarrow
import pyarrow.parquet
import pytest
from hostile import ROWS, mutate, read

pytestmark = pytest.mark.slow

JSON_FILES, PARQUET_FILES = 9_700, 300
SECONDS_A_FILE = 20  # a hundred times what any takes, on a machine that has other work too
MEMORY = 500 << 20


class PeakMemory:
    """The most memory of this process and its children together, sampled, beyond that at first."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._first = self._now()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.peak = 0

    def _now(self) -> int:
        total = self._process.memory_info().rss
        ours = self._process.cmdline()
        for process in self._process.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                # Until it runs its own program, a child shows this process's memory as its own, so
                # its program is asked for first.
                total += process.memory_info().rss if process.cmdline() != ours else 0
        return total

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self.peak = max(self.peak, self._now() - self._first)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


@contextlib.contextmanager
def time_limit(what: str) -> Iterator[None]:
    def late(*_: object) -> None:
        raise TimeoutError(f"{what} took more than {SECONDS_A_FILE} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS_A_FILE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def damage_structure(raw: bytes, chance: random.Random) -> bytes:
    """JSON that still parses but holds other types, or many more of something, in places."""
    value = json.loads(raw)
    junk: list[Any] = [None, True, -1, 1e308, "", "x" * 1000, [], {}, [[]] * 50, {"role": "user"}]
    for _ in range(chance.randint(1, 3)):
        at = value
        while True:
            keys = list(at) if isinstance(at, dict) else list(range(len(at)))
            if not keys:
                break
            key = chance.choice(keys)
            if isinstance(at[key], (dict, list)) and at[key] and chance.random() < 0.7:
                at = at[key]
                continue
            at[key] = copy.deepcopy(chance.choice(junk))
            break
    return json.dumps(value).encode()


def test_damaged_json(tmp_path: Path) -> None:
    chance = random.Random(11)
    usable = 0
    with PeakMemory() as memory:
        for number in range(JSON_FILES):
            row = ROWS[number % len(ROWS)]
            if number % 3 == 0:
                raw = json.dumps([row] * 3).encode()
                raw = damage_structure(raw, chance) if number % 2 else mutate(raw, chance)
            else:
                lines = [json.dumps(row, ensure_ascii=False).encode() for _ in range(3)]
                hit = chance.randrange(3)
                change = damage_structure if number % 2 else mutate
                lines[hit] = change(lines[hit], chance)
                raw = b"\n".join(lines)
                if chance.random() < 0.2:
                    raw = mutate(raw, chance)
            path = tmp_path / chance.choice(["f.jsonl", "f.json", "f"])
            path.write_bytes(raw)
            with time_limit(f"file {number}"):
                usable += read(path).kept > 0
    assert JSON_FILES // 10 < usable < JSON_FILES * 9 // 10
    assert memory.peak < MEMORY


def whole_files(folder: Path) -> list[bytes]:
    """Parquet in several shapes: compressed, with and without dictionaries, nested, binary."""
    flat = [{"prompt": "p é", "response": f"r{i}", "score": float(i)} for i in range(40)]
    nested = [
        {
            "prompt": [{"role": "user", "content": "q"}],
            "responses": ["a" * i, "b", None],
            "scores": [i / 3, None, 1.0],
            "note": b"\x00\xff",
        }
        for i in range(40)
    ]
    options: list[tuple[list[dict[str, Any]], dict[str, Any]]] = [
        (flat, {"compression": "none"}),
        (flat, {"compression": "snappy", "use_dictionary": False, "row_group_size": 7}),
        (nested, {"compression": "none", "data_page_version": "2.0"}),
        (nested, {"compression": "zstd"}),
        (nested, {"compression": "gzip", "use_byte_stream_split": False, "store_schema": False}),
    ]
    out = []
    for number, (rows, chosen) in enumerate(options):
        path = folder / f"whole{number}.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, **chosen)
        out.append(path.read_bytes())
    return out


def damage_parquet(whole: bytes, chance: random.Random) -> bytes:
    """Bytes of the footer, of the pages, or anywhere; or a part of the file."""
    data = bytearray(whole)
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    kind = chance.randrange(5)
    if kind == 4:
        return mutate(whole, chance)
    low, high = [(footer, len(data) - 8), (4, footer), (4, len(data)), (footer, len(data))][kind]
    for _ in range(chance.choice([1, 1, 1, 2, 8])):
        at = chance.randrange(low, high)
        data[at] = chance.choice([0, 0x7F, 0x80, 0xFF, chance.randrange(256), data[at] ^ 1])
    return bytes(data)


def test_damaged_parquet(tmp_path: Path) -> None:
    chance = random.Random(12)
    whole = whole_files(tmp_path)
    paths = []
    for number in range(PARQUET_FILES):
        paths.append(tmp_path / f"{number}.parquet")
        paths[-1].write_bytes(damage_parquet(whole[number % len(whole)], chance))
    others = set(psutil.Process().children())  # what tests before this one may have left
    with PeakMemory() as memory, ThreadPoolExecutor(2) as pool:
        reports = [pool.submit(read, path) for path in paths]
        outcomes = Counter(
            report.result(SECONDS_A_FILE * PARQUET_FILES).kept > 0 for report in reports
        )
    assert min(outcomes.values()) > PARQUET_FILES // 20, outcomes
    assert memory.peak < MEMORY
    assert not set(psutil.Process().children()) - others
