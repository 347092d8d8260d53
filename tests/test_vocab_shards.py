"""A head whose vocabulary is divided among processes gives what the whole head gives, exactly.

Two and three processes over gloo run `tests/support/vocab_shards.py`, in float64.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import vocab_shards as worker
from torchrun import filled_once, torchrun


@pytest.fixture(params=[2, pytest.param(3, marks=pytest.mark.slow)])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What each of the processes found."""

    def fill(folder: Path) -> None:
        torchrun(request.param, str(Path(worker.__file__)), str(folder))

    folder = filled_once(tmp_path_factory, f"vocab_shards-{request.param}", fill)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(request.param)]


def test_every_loss_is_that_of_the_whole_head(found: Any) -> None:
    assert len(worker.all_losses()) >= 16
    for got in found:
        assert len(got["errors"]) > len(worker.all_losses()) + 20
        assert {name: e for name, e in got["errors"].items() if not e < 1e-12} == {}


def test_a_chunk_takes_three_collectives(found: Any) -> None:
    for got in found:
        counts, chunks = got["counts"], got["chunks"]
        assert chunks > 1
        for loss in worker.all_losses():
            assert counts[f"{loss} group"] == {"top": 1, "pair": 1, "hidden": 1}
        small = [name for name in counts if name.startswith(("ListMLE", "DPO"))]
        divided = [counts[name] for name in small if name.split()[-1].isdigit()]
        assert {"top": chunks, "pair": chunks, "hidden": chunks} in divided
        for count in divided:
            assert count["top"] == count["pair"] == count["hidden"]


def test_the_coefficients_have_the_same_bits_on_every_process(found: Any) -> None:
    first, *others = (got["coefficients"] for got in found)
    assert len(first) > 1000
    assert all(torch.equal(first, other) for other in others)


def test_bfloat16_is_as_close_to_float64_as_with_the_whole_head(found: Any) -> None:
    for got in found:
        assert len(got["narrow"]) == 9
        for name, results in got["narrow"].items():
            for divided, whole in results:
                assert divided <= 1.5 * whole + 1e-6, name
            assert max(divided for divided, _ in results) > 1e-4  # it is bfloat16


def test_bad_arguments_are_refused_in_one_line(found: Any) -> None:
    for got in found:
        messages = got["refused"]
        assert messages["kind"].startswith("vocab_group must be a process group")
        assert "labels must lie in [0, 103) (the vocabulary), got 103" in messages["label"]
        assert messages["empty"].startswith("weight must have at least one row")
        assert messages["bias"].startswith("bias must have shape [")
        assert "cannot be differentiated again" in messages["second"]
        assert not any("\n" in message for message in messages.values())
