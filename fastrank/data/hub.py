"""Whether the Hub can be asked for models and data sets."""

from __future__ import annotations

import functools
import os
import sys

#: Seconds to wait for an answer of the Hub before going on without it.
_PATIENCE = 10.0


@functools.cache
def use_hub() -> bool:
    """Whether the Hub answers; asked once. If it does not, the libraries of Hugging Face look into
    their cache alone from here on: they would repeat every request for half a minute."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=_PATIENCE)
    except Exception:  # of the HTTP library's own types, which changed with its version
        os.environ["HF_HUB_OFFLINE"] = "1"  # for what is not imported yet, and other processes
        constants.HF_HUB_OFFLINE = True
        if "datasets" in sys.modules:
            sys.modules["datasets"].config.HF_HUB_OFFLINE = True
        return False
    return True


def in_cache(name: str, file: str) -> bool:
    """Whether a model's file is in the cache of the Hub."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(name, file), str)
    except HFValidationError:  # no name of the Hub
        return False
