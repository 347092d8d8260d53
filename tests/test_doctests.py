"""The examples in the docstrings run."""

from __future__ import annotations

import doctest
import importlib

import pytest

MODULES = [
    "fastrank",
    "fastrank.losses",
    "fastrank.ranking",
    "fastrank.logprobs",
    "fastrank_kernels.planner",
]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0 and result.failed == 0
