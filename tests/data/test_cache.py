"""The cache gives what tokenising gives, once; whatever interrupts a build leaves none."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pyarrow
import pyarrow.parquet
import pytest
from damaging import DAMAGES, damage_file
from datasets import Dataset
from record_files import byte_tokenizer, some_rows, write_jsonl

from fastrank import Group
from fastrank.data import cache, load, manifest
from fastrank.data.cached_groups import CachedGroups
from fastrank.data.load import load_groups
from fastrank.data.tokenize import TokenizeOptions
from fastrank.errors import InputError

TESTS = Path(__file__).resolve().parents[1]


def assert_same(first: Sequence[Group], second: Sequence[Group]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.name == b.name and a.prompt_ids.equal(b.prompt_ids)
        assert a.rewards.equal(b.rewards) and a.rewards.dtype == b.rewards.dtype
        assert [x.tolist() for x in a.response_ids] == [x.tolist() for x in b.response_ids]


def entries(root: Path) -> list[str]:
    """What is in a cache, lock files apart."""
    return sorted(path.name for path in root.iterdir() if path.suffix != ".lock")


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "folder", "flat"])
@pytest.mark.parametrize("num_proc", [1, 2])
def test_cached_groups_are_the_groups(kind: str, num_proc: int, tmp_path: Path) -> None:
    rows = some_rows(700)
    path = tmp_path / f"data.{kind}"
    if kind == "jsonl":
        write_jsonl(path, [*rows[:300], {"prompt": None, "responses": ["x"], "scores": [1]}, *rows])
    elif kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif kind == "folder":
        path.mkdir()
        write_jsonl(path / "train.jsonl", rows)
    else:
        flat = [
            {"prompt": row["prompt"], "response": response, "score": score}
            for row in rows
            for response, score in zip(row["responses"], row["scores"], strict=True)
        ]
        write_jsonl(path, flat)
    options = {"options": TokenizeOptions(max_response_length=60), "normalize_rewards": "group"}
    tokenizer = byte_tokenizer()
    direct, expected = load_groups(path, tokenizer, cache=False, **options)
    assert isinstance(direct, list) and expected.dropped and expected.truncated
    found, report = load_groups(
        path, tokenizer, cache_dir=tmp_path / "cache", num_proc=num_proc, **options
    )
    assert isinstance(found, CachedGroups)
    assert_same(direct, found)
    assert report == expected and report.as_text() == expected.as_text()


def test_a_second_start_opens_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, tokenizer = write_jsonl(tmp_path / "d.jsonl", some_rows(50)), byte_tokenizer()
    first, report = load_groups(path, tokenizer, cache_dir=tmp_path / "cache")
    monkeypatch.setattr(cache, "encode_rows", None)  # to call it would be an error
    second, again = load_groups(path, byte_tokenizer(), cache_dir=tmp_path / "cache")
    assert_same(first, second)
    assert again == report and again.name == str(path)
    # The same file by another name: its own name in messages, the same entry.
    other = tmp_path / "link.jsonl"
    other.symlink_to(path)
    third, again = load_groups(other, tokenizer, cache_dir=tmp_path / "cache")
    assert third[0].name == f"{other}:{first[0].name.split(':')[-1]}" and again.name == str(other)
    (entry,) = entries(tmp_path / "cache")
    (groups,) = (tmp_path / "cache" / entry).glob("*.arrow")
    assert len(Dataset.from_file(str(groups))) == len(first)


def test_whatever_the_groups_depend_on_makes_an_entry_of_its_own(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", some_rows(30))
    root = tmp_path / "cache"
    other = byte_tokenizer()
    other.add_special_tokens({"eos_token": "<end>"})
    changes: list[dict[str, Any]] = [
        {},
        {"options": TokenizeOptions(max_response_length=10)},
        {"context_length": 40},
        {"options": TokenizeOptions(as_chat=True)},
        {"normalize_rewards": "group"},
        {"max_candidates": 2},
        {"min_candidates": 3},
        {"tokenizer": other},
        {"tokenizer": byte_tokenizer("{{ messages[0].content }}")},
    ]
    for number, change in enumerate(changes, start=1):
        load_groups(path, change.pop("tokenizer", byte_tokenizer()), cache_dir=root, **change)
        assert len(entries(root)) == number
    text = path.read_text()
    assert "cat" in text
    before = path.stat()
    path.write_text(text.replace("cat", "cow", 1))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # same size, same time
    changed, _ = load_groups(path, byte_tokenizer(), cache_dir=root)
    assert len(entries(root)) == len(changes) + 1
    assert_same(changed, load_groups(path, byte_tokenizer(), cache=False)[0])


def test_a_used_tokenizer_is_the_same_tokenizer(tmp_path: Path) -> None:
    path, tokenizer = write_jsonl(tmp_path / "d.jsonl", some_rows(5)), byte_tokenizer()
    load_groups(path, tokenizer, cache_dir=tmp_path / "cache")
    tokenizer(["a", "b c"], truncation=True, max_length=2)
    load_groups(path, tokenizer, cache_dir=tmp_path / "cache")
    assert len(entries(tmp_path / "cache")) == 1


def test_large_files_alone_are_cached_unless_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    path, tokenizer = write_jsonl(tmp_path / "d.jsonl", some_rows(40)), byte_tokenizer()
    assert isinstance(load_groups(path, tokenizer)[0], list)
    assert not (tmp_path / "home").exists()
    monkeypatch.setattr(load, "CACHE_FROM", path.stat().st_size)
    assert isinstance(load_groups(path, tokenizer)[0], CachedGroups)
    assert len(entries(tmp_path / "home" / "fastrank")) == 1
    assert isinstance(load_groups(path, tokenizer, cache=False)[0], list)
    assert sorted(os.listdir(tmp_path)) == ["d.jsonl", "home"]
    with pytest.raises(InputError, match="cache_dir has no use without a cache"):
        load_groups(path, tokenizer, cache=False, cache_dir=tmp_path)
    with pytest.raises(InputError, match="num_proc must be at least 1, got 0"):
        load_groups(path, tokenizer, num_proc=0)


def test_default_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache.default_cache_dir() == Path("/home/someone/.cache/fastrank")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert cache.default_cache_dir() == Path("/cache/fastrank")
    monkeypatch.setenv("HF_HOME", "/big")
    assert cache.default_cache_dir() == Path("/big/fastrank")


@pytest.mark.parametrize("num_proc", [1, 2])
def test_an_error_names_the_first_wrong_line_and_leaves_nothing(
    num_proc: int, tmp_path: Path
) -> None:
    rows: list[dict[str, Any]] = some_rows(900)
    for line in (520, 890):
        rows[line - 1] = {"prompt": "p", "responses": ["a", "b"], "scores": [1, "good"]}
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    with pytest.raises(InputError, match=r"d.jsonl, line 520: scores\[1\] is 'good'"):
        load_groups(path, byte_tokenizer(), cache_dir=tmp_path / "cache", num_proc=num_proc)
    assert entries(tmp_path / "cache") == []
    with pytest.raises(InputError, match="no usable record: 2 read, 2 fewer than 2 candidates"):
        write_jsonl(path, [{"prompt": "p", "responses": ["a"], "scores": [1]}] * 2)
        load_groups(path, byte_tokenizer(), cache_dir=tmp_path / "cache", num_proc=num_proc)
    assert entries(tmp_path / "cache") == []


def test_a_file_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", some_rows(20))
    whole = cache.encode_rows

    def change(*args: Any) -> Any:
        yield from whole(*args)
        path.write_text(path.read_text() + "\n")

    monkeypatch.setattr(cache, "encode_rows", change)
    with pytest.raises(InputError, match="changed while it was read"):
        load_groups(path, byte_tokenizer(), cache_dir=tmp_path / "cache")
    assert entries(tmp_path / "cache") == []


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", some_rows(5))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="the cache cannot be written: .*--cache_dir") as caught:
        load_groups(path, byte_tokenizer(), cache_dir=tmp_path / "file" / "cache")
    assert "\n" not in str(caught.value)


def test_whatever_is_damaged_in_an_entry_it_is_built_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Every damage to every file ends in the same groups and report, and in one line."""
    path, root = write_jsonl(tmp_path / "d.jsonl", some_rows(40)), tmp_path / "cache"
    direct, report = load_groups(path, byte_tokenizer(), cache=False)
    load_groups(path, byte_tokenizer(), cache_dir=root, num_proc=2)
    entry = root / entries(root)[0]
    whole = {file.name: file.read_bytes() for file in entry.iterdir()}
    first = "groups-00000.arrow"
    assert whole.keys() == {"about.json", "report.json", first, "groups-00001.arrow"}

    def damages() -> Iterator[tuple[str, str]]:
        for name in whole:
            for kind in DAMAGES:
                damage_file(entry / name, kind)
                yield name, kind
            (entry / name).unlink()
            yield name, "missing"
        (entry / "groups-00002.arrow").write_bytes(whole[first])
        yield "groups-00002.arrow", "one too many"
        with pyarrow.ipc.open_stream(whole[first]) as reader:
            table = reader.read_all()
        with pyarrow.ipc.new_stream(str(entry / first), table.schema) as writer:
            writer.write_table(table.slice(0, 10))
        yield first, "fewer rows"

    seen = 0
    for name, kind in damages():
        caplog.clear()
        # In one process: the same groups in other files.
        found, same = load_groups(path, byte_tokenizer(), cache_dir=root, num_proc=1)
        assert_same(found, direct)
        assert same == report and entries(root) == [entry.name]
        assert len(caplog.messages) == 1, (name, kind)
        assert re.fullmatch(rf"{entry} is damaged \(.*\): built anew", caplog.messages[0])
        caplog.clear()
        load_groups(path, byte_tokenizer(), cache_dir=root)
        assert not caplog.messages
        shutil.rmtree(entry)
        entry.mkdir()
        for other, content in whole.items():
            (entry / other).write_bytes(content)
        seen += 1
    assert seen >= 4 * len(DAMAGES)


def test_a_file_that_shrinks_under_a_reader_is_one_line(tmp_path: Path) -> None:
    """Where its memory would be touched, the process would be ended by SIGBUS."""
    path, root = write_jsonl(tmp_path / "d.jsonl", some_rows(700)), tmp_path / "cache"
    uses: list[Callable[[Sequence[Group]], Any]] = [
        lambda groups: groups[0],
        lambda groups: groups[len(groups) - 1],
        *(
            lambda groups, name=name: getattr(groups, name)
            for name in ("sizes", "largest_ids", "prompt_keys")
        ),
        lambda groups: list(groups.flat_parts()),
        lambda groups: list(groups.select([3, 2])),
    ]
    for use in uses:
        groups, _ = load_groups(path, byte_tokenizer(), cache_dir=root)
        use(groups)
        again, _ = load_groups(path, byte_tokenizer(), cache_dir=root)
        file = next((root / entries(root)[0]).glob("*.arrow"))
        os.truncate(file, 1000)
        with pytest.raises(InputError, match="arrow: a file of the cache has shrunk") as caught:
            use(again)
        assert "\n" not in str(caught.value)


# ---- interruptions ---------------------------------------------------------------------------

BUILD = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell ignores it
import sys
from record_files import byte_tokenizer
from fastrank.data import cache
from fastrank.data.load import load_groups
from fastrank.errors import InputError
{before}
try:
    groups, _ = load_groups({path!r}, byte_tokenizer(), cache_dir={root!r}, num_proc=2)
except InputError as error:
    print("error:", error)
else:
    print(len(groups))
"""


def start(path: Path, root: Path, before: str = "") -> subprocess.Popen[str]:
    code = BUILD.format(before=before, path=str(path), root=str(root))
    places = [str(TESTS.parent), str(TESTS.parent / "kernels/torch-ext"), str(TESTS / "support")]
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(places)},
    )


SLOW_WRITES = """
import os, time
slowly = cache.encode_rows
def encode_rows(*args):
    for number, found in enumerate(slowly(*args)):
        if number % 100 == 0:
            os.write(1, b"portion\\n")
            time.sleep(0.2)
        yield found
cache.encode_rows = encode_rows
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_build_leaves_no_entry_and_no_process(how: signal.Signals, tmp_path: Path) -> None:
    path, root = write_jsonl(tmp_path / "d.jsonl", some_rows(1600)), tmp_path / "cache"
    build = start(path, root, SLOW_WRITES)
    assert build.stdout is not None
    assert [build.stdout.readline() for _ in range(3)] == ["portion\n"] * 3
    workers = psutil.Process(build.pid).children(recursive=True)
    assert len(workers) >= 2
    build.send_signal(how)
    _, messages = build.communicate(timeout=60)
    assert build.returncode == -how
    (left,) = entries(root) or [""]
    assert left.endswith(".incomplete") if how == signal.SIGKILL else not left
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive
    if how == signal.SIGINT:
        assert messages.count("Traceback") == 1  # the main process's own, none of the workers'
    found, _ = load_groups(path, byte_tokenizer(), cache_dir=root, num_proc=2)
    assert_same(found, load_groups(path, byte_tokenizer(), cache=False)[0])
    assert len(entries(root)) == 1 and not entries(root)[0].endswith(".incomplete")


def test_leftovers_of_other_builds_are_removed_unless_they_go_on(tmp_path: Path) -> None:
    from filelock import FileLock

    root = tmp_path / "cache"
    for name in ("dead", "alive"):
        (root / f"groups-{name}.incomplete").mkdir(parents=True)
    path = write_jsonl(tmp_path / "d.jsonl", some_rows(5))
    with FileLock(root / "groups-alive.lock"):
        load_groups(path, byte_tokenizer(), cache_dir=root)
    assert [e for e in entries(root) if "incomplete" in e] == ["groups-alive.incomplete"]


def test_processes_that_start_together_build_once(tmp_path: Path) -> None:
    path, root = write_jsonl(tmp_path / "d.jsonl", some_rows(600)), tmp_path / "cache"
    builds = [start(path, root, SLOW_WRITES) for _ in range(2)]
    said = [build.communicate(timeout=120) for build in builds]
    counts = [out.splitlines()[-1] for out, _ in said]
    assert counts == [str(len(load_groups(path, byte_tokenizer(), cache=False)[0]))] * 2, said
    assert sorted("portion" in out for out, _ in said) == [False, True]


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    path, root = write_jsonl(tmp_path / "d.jsonl", some_rows(2000)), tmp_path / "cache"
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))"
    out, messages = start(path, root, limit).communicate(timeout=120)
    assert out.startswith("error: ") and "the cache cannot be written: " in out, messages
    assert out.count("\n") == 1 and entries(root) == []


def test_a_killed_worker_is_one_line(tmp_path: Path) -> None:
    path, root = write_jsonl(tmp_path / "d.jsonl", some_rows(1600)), tmp_path / "cache"
    build = start(path, root, SLOW_WRITES)
    assert build.stdout is not None and build.stdout.readline() == "portion\n"
    psutil.Process(build.pid).children()[0].kill()
    out, messages = build.communicate(timeout=60)
    assert "error: a tokenising process was ended from outside" in out, messages
    assert entries(root) == []


def test_large_files_are_hashed_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "_BLOCK", 16)
    path = tmp_path / "large"
    path.write_bytes(bytes(range(256)) * 40)
    hashes = {manifest.content_hash(path)}
    size = path.stat().st_size
    assert size > 64 * 16
    for at in (0, size - 1, (size - 16) // 63 + 3):  # of the first, last and second block
        data = bytearray(path.read_bytes())
        data[at] ^= 1
        path.write_bytes(data)
        hashes.add(manifest.content_hash(path))
    assert len(hashes) == 4
    started = time.perf_counter()
    monkeypatch.undo()
    with path.open("wb") as file:
        file.truncate(1 << 40)  # a terabyte of nothing
    manifest.content_hash(path)
    assert time.perf_counter() - started < 5
