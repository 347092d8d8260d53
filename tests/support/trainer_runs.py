"""What two training runs are compared by."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Trainer


def step_logs(trainer: Any) -> list[dict[str, Any]]:
    """The log entries of training steps."""
    return [row for row in trainer.state.log_history if "grad_norm" in row]


def assert_same_weights(one: Any, other: Any, *, atol: float = 0.0, rtol: float = 0.0) -> None:
    """Of two trainers or models: bit for bit, or within a tolerance."""
    found, expected = (
        (run.model if isinstance(run, Trainer) else run).state_dict() for run in (one, other)
    )
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=atol, rtol=rtol)


def assert_same_values(
    found: dict[str, float], expected: dict[str, float], *, rel: float, abs: float = 1e-12
) -> None:
    """Of two evaluations, timings aside."""
    assert found.keys() >= expected.keys()
    for key, value in expected.items():
        if "runtime" not in key and "per_second" not in key:
            assert found[key] == pytest.approx(value, rel=rel, abs=abs), key
