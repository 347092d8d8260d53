"""What tokenised groups depend on, as short texts: the source's content and the tokenizer.

A file is known by its resolved path, size, time of change and a hash of its content; beyond 64 MiB
of 64 blocks of it, which a second start pays in milliseconds. A copy or a touched file is therefore
tokenised again, which costs time and never correctness; hashing everything would save that, at a
second for each gigabyte of every start. What would go unseen: a large file edited in place, between
the blocks, without a change of its size, by a program that then sets its time of change back.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastrank.data.files import Source
from fastrank.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BLOCK = 1 << 20
_BLOCKS = 64


def source_identity(source: Source) -> dict[str, Any]:
    """The source's content, as JSON types.

    A folder's or a Hub data set's is the fingerprint that `datasets` gives it: of the builder, its
    configuration and the versions of the files.
    """
    if source.path is None:
        return {"dataset": source.dataset._fingerprint}
    status = source.path.stat()
    return {
        "path": str(source.path.resolve()),
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "content": content_hash(source.path),
    }


def content_hash(path: Path) -> str:
    """Hash of a file's bytes, or of evenly spaced blocks of a large file."""
    digest = hashlib.blake2b(digest_size=16)
    size = path.stat().st_size
    starts = range(0, size, _BLOCK)
    if size > _BLOCK * _BLOCKS:
        starts = [k * (size - _BLOCK) // (_BLOCKS - 1) for k in range(_BLOCKS)]  # type: ignore[assignment]
    try:
        with path.open("rb") as file:
            for start in starts:
                file.seek(start)
                digest.update(file.read(_BLOCK))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of everything that a tokenizer's output depends on: its serialised content, the
    chat template, the special tokens."""
    digest = hashlib.blake2b(digest_size=16)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        for transient in ("truncation", "padding"):  # set and unset by every call
            content.pop(transient, None)
        digest.update(json.dumps(content, sort_keys=True).encode())
    else:  # one in Python: whatever it saves
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            for path in sorted(Path(folder).rglob("*")):
                if path.is_file():
                    digest.update(path.name.encode() + path.read_bytes())
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    about = [
        type(tokenizer).__name__,
        tokenizer.chat_template,
        special,
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
    ]
    digest.update(json.dumps(about, sort_keys=True, default=str).encode())
    return digest.hexdigest()
