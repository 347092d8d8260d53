"""The helpers of `pack_cases` as a fixture."""

from __future__ import annotations

from types import ModuleType

import pack_cases
import pytest


@pytest.fixture(scope="session")
def cases() -> ModuleType:
    return pack_cases
