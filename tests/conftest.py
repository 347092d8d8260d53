"""Fixtures that every test folder shares."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


def _shared_or_skip(relative: str) -> Path:
    path = SHARED / relative
    if not path.exists():
        pytest.skip(f"{relative} is not beside this checkout")
    return path


@pytest.fixture(scope="session")
def oasst_path() -> Path:
    """212 prompts with ranked replies (JSON lines), from OpenAssistant."""
    return _shared_or_skip("data/oasst_en_ranked.jsonl")


@pytest.fixture(scope="session")
def story_model_path() -> Path:
    """A real pre-trained Llama of 260 K parameters."""
    return _shared_or_skip("models/tinystories-260k")
