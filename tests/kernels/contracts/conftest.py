"""The kernels' contracts, run on whatever can run a kernel.

With TRITON_INTERPRET=1 the kernels are Python and the tensors are on the CPU:
``test_interpreted.py`` starts such a process for every file here, because triton has to be
imported in that mode and the rest of the suite may not be. Without it the same tests need a GPU,
and are marked so.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_itemcollected(item: pytest.Item) -> None:
    if not INTERPRETED:
        item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device() -> torch.device:
    """Where this process runs kernels."""
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Every ``torch.empty`` is full of NaN (or of the largest integers)."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20240229)
