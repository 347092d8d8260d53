"""Short names for the content of files and models, to tell whether a half-done run still applies.

Data is hashed whole. Weights may be tens of gigabytes, so of each weight file only its size and
blocks spread evenly over it are read: training moves every tensor, and with it every block.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

_BLOCK = 1 << 16
_BLOCKS = 64


def file_fingerprint(path: str | Path) -> str:
    """Hash of a file's content; of a Hub name or a folder, the name."""
    local = Path(path).expanduser()
    digest = hashlib.sha256()
    if not local.is_file():
        digest.update(str(path).encode())
        return digest.hexdigest()[:32]
    with local.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:32]


def model_fingerprint(path: str | Path) -> str:
    """Hash of a model folder's configuration, tokenizer and weights; of a Hub name, the name."""
    local = Path(path).expanduser()
    digest = hashlib.sha256()
    if not local.is_dir():
        digest.update(str(path).encode())
        return digest.hexdigest()[:32]
    for file in sorted(local.glob("*.json")):
        digest.update(file.name.encode())
        digest.update(file.read_bytes())
    for file in sorted(local.glob("*.safetensors")):
        digest.update(file.name.encode())
        _update_from_blocks(digest, file)
    return digest.hexdigest()[:32]


def _update_from_blocks(digest: hashlib._Hash, path: Path) -> None:
    size = path.stat().st_size
    digest.update(str(size).encode())
    with path.open("rb") as file:
        if size <= _BLOCK * _BLOCKS:
            digest.update(file.read())
            return
        for k in range(_BLOCKS):
            file.seek(k * (size - _BLOCK) // (_BLOCKS - 1))
            digest.update(file.read(_BLOCK))
