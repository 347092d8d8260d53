"""What a model is, as a short text: to tell whether work done with it still applies."""

from __future__ import annotations

import hashlib
from pathlib import Path

from fastrank.data.identity import content_hash
from fastrank.modeling.pretrained import adapter_base, is_adapter

#: Files of a model folder that its output depends on.
_FILES = ("*.json", "*.jinja", "*.safetensors")


def model_identity(path: str | Path) -> str:
    """Hash of a model folder's configuration, tokenizer and weights; of a Hub name, the name; of an
    adapter, of its folder and its base model.

    Of weight files beyond 64 MiB only evenly spaced blocks are read: training moves every tensor,
    and with it every block.
    """
    local = Path(path).expanduser()
    digest = hashlib.blake2b(digest_size=16)
    if not local.is_dir():
        digest.update(str(path).encode())
        return digest.hexdigest()
    if is_adapter(local):
        digest.update(model_identity(adapter_base(local)).encode())
    for file in sorted(found for pattern in _FILES for found in local.glob(pattern)):
        digest.update(f"{file.name} {content_hash(file)}\n".encode())
    return digest.hexdigest()
