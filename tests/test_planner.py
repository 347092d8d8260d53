"""The planner: strategy, chunk and number of products from sizes and budget."""

from __future__ import annotations

import pytest

from fastrank_kernels.planner import (
    CPU_CHUNK_ROWS,
    default_logits_memory,
    group_chunks,
    plan_ranking,
    row_pitch,
)

SIZES = {"rows": 4000, "largest_group": 900, "vocab": 1024, "logits_itemsize": 4}


@pytest.mark.parametrize(
    ("hidden", "head", "budget", "strategy", "products"),
    [
        (False, False, 10**9, "forward", 1),
        (True, True, 10**9, "group", 3),
        (True, False, 10**9, "group", 2),
        (False, True, 10**9, "group", 2),
        (True, True, 4096 * 899, "recompute", 4),
        (False, True, 4096 * 899, "recompute", 3),
        (True, False, 4096 * 899, "unit", 2),
    ],
)
def test_strategy(hidden, head, budget, strategy, products) -> None:
    plan = plan_ranking(
        **SIZES, hidden_grad=hidden, head_grad=head, budget=budget, device_type="cpu"
    )
    assert (plan.strategy, plan.products) == (strategy, products)
    assert plan.reason


@pytest.mark.parametrize(
    ("device", "itemsize", "budget", "rows"),
    [
        ("cpu", 4, 10**9, CPU_CHUNK_ROWS),
        ("cpu", 2, 10**9, 4000),
        ("cpu", 4, 4096 * 100, 100),
        ("cuda", 4, 10**9, 4000),
        ("cuda", 4, 4096 * 1500, 1500),
        ("cuda", 4, 1, 1),
    ],
)
def test_chunks_are_as_large_as_pays_within_the_budget(device, itemsize, budget, rows) -> None:
    sizes = {**SIZES, "logits_itemsize": itemsize}
    plan = plan_ranking(
        **sizes, hidden_grad=True, head_grad=True, budget=budget, device_type=device
    )
    assert plan.chunk_rows == rows


def test_rows_are_counted_with_their_pitch() -> None:
    """A vocabulary that 64 does not divide takes as much memory as the next that it does."""
    assert [row_pitch(vocab) for vocab in (1, 64, 32001, 50257)] == [64, 64, 32064, 50304]
    sizes = {"hidden_grad": True, "head_grad": True, "budget": 4096 * 900, "device_type": "cuda"}
    assert plan_ranking(**{**SIZES, "vocab": 961}, **sizes).strategy == "group"
    assert plan_ranking(**{**SIZES, "vocab": 1025}, **sizes).strategy == "recompute"


def test_groups_are_never_cut() -> None:
    offsets = [0, 3, 3, 10, 12, 13, 40, 41]
    for rows in (1, 4, 10, 13, 100):
        chunks = group_chunks(offsets, rows)
        assert [a for a, _ in chunks[1:]] == [b for _, b in chunks[:-1]]
        assert chunks[0][0] == 0 and chunks[-1][1] == 7
        for a, b in chunks:
            assert b - a == 1 or offsets[b] - offsets[a] <= rows
    assert group_chunks([0], 5) == []


def test_the_default_budget_is_the_same_every_time() -> None:
    assert default_logits_memory("cpu", None) == default_logits_memory("cpu", None) > 2**20
