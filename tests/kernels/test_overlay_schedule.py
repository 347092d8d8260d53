"""Why a barrier stands in every block when narrow gradients are written over wide logits.

A model of one program: its warps walk the blocks of a row, each loading and storing its own part of
every block, and nothing but a barrier holds one warp near another. The row's memory counts in units
of the narrow type: wide element i lies at 2i and 2i + 1, the narrow one at i. The kernel itself is
compared bit for bit with a second buffer in ``contracts/test_dlogits_contract.py``, and its
compiled order of loads, barrier and stores is read in ``test_ahead_of_time.py``.
"""

from __future__ import annotations

import random

WARPS, BLOCK, BLOCKS = 8, 32, 12


def corrupted(seed: int, barrier_in: range) -> bool:
    """Whether, under one random schedule, some warp loads what another has already overwritten."""
    choose = random.Random(seed)
    overwritten: set[int] = set()
    # A warp's next step: 2k loads block k, 2k + 1 stores it.
    steps = [0] * WARPS
    while (unfinished := [w for w in range(WARPS) if steps[w] < 2 * BLOCKS]) != []:
        warp = choose.choice(unfinished)
        block, storing = divmod(steps[warp], 2)
        part = BLOCK // WARPS
        columns = range(block * BLOCK + warp * part, block * BLOCK + (warp + 1) * part)
        if storing:
            waiting = block in barrier_in and any(step < 2 * block + 1 for step in steps)
            if waiting:
                continue
            overwritten.update(columns)
        elif any(2 * i in overwritten or 2 * i + 1 in overwritten for i in columns):
            return True
        steps[warp] += 1
    return False


def test_without_barriers_schedules_corrupt() -> None:
    assert sum(corrupted(seed, range(0)) for seed in range(200)) >= 190


def test_a_barrier_in_the_first_block_alone_is_not_enough() -> None:
    assert any(corrupted(seed, range(1)) for seed in range(200))


def test_a_barrier_in_every_block_is_enough() -> None:
    assert not any(corrupted(seed, range(BLOCKS)) for seed in range(200))
