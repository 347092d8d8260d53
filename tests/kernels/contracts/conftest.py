"""The kernels' contracts, run on whatever can run a kernel.

With TRITON_INTERPRET=1 the kernels are Python and the tensors are on the CPU:
``test_interpreted.py`` starts such a process for every file here, because triton has to be
imported in that mode and the rest of the suite may not be. Without it the same tests need a GPU,
and are marked so.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_itemcollected(item: pytest.Item) -> None:
    if not INTERPRETED:
        item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session", autouse=True)
def _faster_interpreter() -> None:
    """Every call of a device function lists all members of triton's language, to find what it has
    found before: a third of the time. What is built in stays the same."""
    if not INTERPRETED:
        return
    import inspect

    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    @cache
    def builtins(package: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(package) if is_builtin(member)]

    def patch(package: Any, builder: Any, scope: Any) -> None:
        for name in builtins(package):
            member = getattr(package, name)
            if is_builtin(member):
                interpreter._patch_attr(package, name, member, builder, scope)

    setattr(interpreter, "_patch_builtin", patch)  # noqa: B010


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
def _bfloat16_to_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter cuts float32 off where a GPU rounds it to the nearest bfloat16."""
    if not INTERPRETED:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(values: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(values, source, target, rounding)
        narrow = torch.from_numpy(values.copy()).to(torch.bfloat16)
        return narrow.view(torch.uint16).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", rounded)


@pytest.fixture
def approximate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exponentials, logarithms and quotients are off by as much as a GPU's may be: two units in the
    last place, and an exponential by its argument's rounding before that."""
    if not INTERPRETED:
        return
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder

    def off(x: Any) -> Any:
        x = np.asarray(x)
        bits = x.view(np.uint32 if x.itemsize == 4 else np.uint64)
        return (x * (1 + 2.0**-22 * np.sin(bits))).astype(x.dtype)

    def exp(builder: Any, x: Any) -> Any:
        scaled = lambda v: off(np.exp2((v * np.float32(np.log2(np.e))).astype(v.dtype)))  # noqa: E731
        return builder.unary_op(x, scaled)

    def log(builder: Any, x: Any) -> Any:
        return builder.unary_op(x, lambda v: off(np.log(v)))

    def divide(builder: Any, x: Any, y: Any) -> Any:
        return builder.binary_op(x, y, lambda a, b: off(np.divide(a, b)))

    for name, function in {"exp": exp, "log": log, "fdiv": divide}.items():
        monkeypatch.setattr(InterpreterBuilder, f"create_{name}", function)
