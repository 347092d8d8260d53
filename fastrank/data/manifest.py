"""Checksums of files and of values; lists of a folder's files, which tell damage apart.

A list is sealed: it holds a checksum of itself too, so that nothing in it is believed that was not
written by a run. Against damage, not against forgery.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fastrank.errors import InputError

FileList = dict[str, dict[str, Any]]

_BLOCK = 1 << 20
_BLOCKS = 64
_SEAL = "xxh3"
_THREADS = 4  # that read files to hash them
_LARGEST = 1 << 24  # bytes of a sealed file; a list of files has a few thousand


def written_files(folder: Path, files: Sequence[Path]) -> FileList:
    """Size and checksum of each of a folder's files, by its name there, all flushed to the disk.

    Raises:
        OSError: a file cannot be read or flushed.
    """
    with ThreadPoolExecutor(2 * _THREADS) as threads:  # half of them wait for the disk
        flushed = [threads.submit(flush, file) for file in files]
        found = list(threads.map(file_checksum, files))
        for one in flushed:
            one.result()
    return {
        str(file.relative_to(folder)): {"bytes": file.stat().st_size, "xxh3": checksum}
        for file, checksum in zip(files, found, strict=True)
    }


def damaged_file(folder: Path, files: FileList, *, checksums: bool = True) -> str | None:
    """What distinguishes a folder's files from those listed, in a few words; None if nothing does.

    Args:
        checksums: whether to read all files, or to look at their sizes only.
    """
    for name, about in files.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != about["bytes"]:
            return f"{name} has {file.stat().st_size} bytes instead of {about['bytes']}"
    if not checksums:
        return None
    with ThreadPoolExecutor(_THREADS) as threads:
        found = threads.map(_readable_checksum, [folder / name for name in files])
        for (name, about), checksum in zip(files.items(), found, strict=True):
            if checksum != about["xxh3"]:
                return f"the bytes of {name} are not those that were written"
    return None


def _readable_checksum(file: Path) -> str | None:
    try:
        return file_checksum(file)
    except OSError:  # a defective disk
        return None


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Write a value of JSON types with its checksum, flushed to the disk.

    Raises:
        OSError: it cannot be written.
    """
    path.write_text(_sealed(json.loads(json.dumps(value))), encoding="utf-8")
    flush(path)


def read_sealed(path: Path) -> dict[str, Any] | None:
    """What `write_sealed` wrote; None for any other content."""
    try:
        if path.stat().st_size > _LARGEST:
            return None
        text = path.read_text(encoding="utf-8")
        value = json.loads(text)
        value.pop(_SEAL)
        if text != _sealed(value):
            return None
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _sealed(value: dict[str, Any]) -> str:
    return json.dumps(value | {_SEAL: value_checksum(value)}, indent=1) + "\n"


def flush(path: Path) -> None:
    """Have a file or folder on the disk before anything relies on it.

    Raises:
        OSError: the disk cannot take it.
    """
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open a folder to flush it
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_checksum(path: Path) -> str:
    """XXH3 of a file's bytes, all of them, as 32 hexadecimal digits: to find damage, not forgery.

    All bytes are read, which no hash of the standard library does as fast as disks write them.

    Raises:
        OSError: the file cannot be read.
    """
    from xxhash import xxh3_128

    digest = xxh3_128()
    block = memoryview(bytearray(1 << 22))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
    return digest.hexdigest()


def value_checksum(value: Any) -> str:
    """XXH3 of a value of JSON types, as 32 hexadecimal digits; the order of keys is no part of it.

    >>> value_checksum({"a": 1, "b": [2.5, None]}) == value_checksum({"b": [2.5, None], "a": 1})
    True
    """
    from xxhash import xxh3_128

    return xxh3_128(json.dumps(value, sort_keys=True).encode()).hexdigest()


def content_hash(path: Path) -> str:
    """Hash of a file's bytes; beyond 64 MiB of 64 evenly spaced MiB.

    A large file edited in place, between the blocks, without a change of its size, by a program
    that then sets its time of change back, would go unseen. Hashing everything would cost every
    start a second per gigabyte.
    """
    digest = hashlib.blake2b(digest_size=16)
    size = path.stat().st_size
    starts: Sequence[int] = range(0, size, _BLOCK)
    if size > _BLOCK * _BLOCKS:
        starts = [k * (size - _BLOCK) // (_BLOCKS - 1) for k in range(_BLOCKS)]
    try:
        with path.open("rb") as file:
            for start in starts:
                file.seek(start)
                digest.update(file.read(_BLOCK))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    return digest.hexdigest()
