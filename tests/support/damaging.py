"""What happens to files on disks and in copies, as a table to damage any file by."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

Damage = Callable[[bytes], bytes]


def flipped(share: float) -> Damage:
    """One bit at a share of the file."""

    def damage(content: bytes) -> bytes:
        at = min(int(share * len(content)), len(content) - 1)
        return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]

    return damage


def swapped(content: bytes) -> bytes:
    """Two different bytes in each other's place: the same size, and the same sum."""
    first = len(content) // 3
    other = next(i for i in range(first, len(content)) if content[i] != content[first])
    out = bytearray(content)
    out[first], out[other] = out[other], out[first]
    return bytes(out)


#: By name; every one changes every file that is no single repeated byte.
DAMAGES: dict[str, Damage] = {
    **{f"bit at {share:.2f}": flipped(share) for share in (0, 0.07, 0.25, 0.5, 0.75, 0.99)},
    "swapped bytes": swapped,
    "emptied": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "without its last byte": lambda content: content[:-1],
    "with a byte more": lambda content: content + b"\n",
    "zeroed": lambda content: bytes(len(content)),
    "zeroed tail": lambda content: content[: len(content) // 2] + bytes(-(-len(content) // 2)),
    "garbage": lambda content: bytes((37 * i + 11) % 256 for i in range(len(content))),
    "twice": lambda content: content * 2,
    **{
        f"JSON {value!r:.12}": lambda content, value=value: json.dumps(value).encode()
        for value in (None, [], {}, 3, "text", {"files": 1}, {"files": {"a": {}}}, {"plan": None})
    },
    "nested JSON": lambda content: b"[" * 100_000,
}


def damage_file(file: Path, name: str) -> None:
    """Damage a file in place by the entry of `DAMAGES`."""
    before = file.read_bytes()
    after = DAMAGES[name](before)
    assert after != before, f"{name} leaves {file.name} as it is"
    file.write_bytes(after)
