"""Splitting groups into those to train on and those held out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastrank.data.columns import prompt_keys, select
from fastrank.data.packing import Group
from fastrank.errors import InputError


def split_by_prompt(
    groups: Sequence[Group], fraction: float, *, seed: int
) -> tuple[Sequence[Group], Sequence[Group]]:
    """Split into (training, held out) by a seeded share of the prompts; the groups of one prompt
    stay together.

    Args:
        fraction: of the different prompts, in [0, 1); at least one prompt is held out, unless
        it is 0.

    Raises:
        InputError: the fraction is out of range, or there is only one prompt.
    """
    if not 0 <= fraction < 1:
        raise InputError(f"eval_fraction must be at least 0 and below 1, got {fraction}")
    if fraction == 0:
        return groups, []
    keys = prompt_keys(groups)
    prompts = np.sort(keys)  # np.unique hashes, which is far slower
    prompts = prompts[np.diff(prompts, prepend=prompts[:1] - 1) != 0]
    if len(prompts) < 2:
        raise InputError(
            f"holding out a share of the prompts needs at least 2 different ones, "
            f"got {len(prompts)}; pass --eval_data or --eval_fraction 0"
        )
    count = min(max(1, round(fraction * len(prompts))), len(prompts) - 1)
    chosen = np.random.default_rng(seed).permutation(len(prompts))[:count]
    heldout = np.isin(keys, prompts[chosen])
    return select(groups, np.flatnonzero(~heldout)), select(groups, np.flatnonzero(heldout))


def shared_prompts(first: Sequence[Group], second: Sequence[Group]) -> int:
    """Count the groups of ``second`` whose prompt ``first`` has too."""
    keys, others = prompt_keys(first), prompt_keys(second)
    known = keys[np.isin(keys, others)]  # the long list is only searched through, never sorted
    return int(np.isin(others, known).sum())


def choose_groups(groups: Sequence[Group], count: int, *, seed: int) -> Sequence[Group]:
    """Choose at most ``count`` groups by a seed, in the given order."""
    if len(groups) <= count:
        return groups
    chosen = np.random.default_rng(seed).choice(len(groups), count, replace=False)
    return select(groups, np.sort(chosen))
