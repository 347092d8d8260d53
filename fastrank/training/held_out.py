"""What a run's report is made from beside its metrics: held-out prompts with the model's scores
before and after, and how rewards are spread."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

from fastrank.data.columns import flat_parts
from fastrank.data.group import Group
from fastrank.visual.pages import reward_bins
from fastrank.visual.shown_groups import (
    FILE,
    chosen_positions,
    decoded_groups,
    read_groups,
    with_scores,
    write_groups,
)

_MOST_REWARDS = 100_000


def keep_scores(
    folder: Path,
    groups: Sequence[Group],
    tokenizer: Any,
    scores: Sequence[Any] | None,
    when: Literal["before", "after"],
) -> None:
    """Write ``held_out.jsonl``, with the scores of the other time that it has of the same prompts.

    Args:
        folder: of the run.
        groups: the held-out data.
        tokenizer: that they were made with.
        scores: one array per group; None if they were not computed in this process.
        when: to which time they belong.
    """
    shown = decoded_groups(groups, tokenizer)
    known = read_groups(folder / FILE)
    same = [(k.prompt, k.responses) for k in known] == [(s.prompt, s.responses) for s in shown]
    if when == "after" and same:
        shown = known
    if scores is not None:
        chosen = [scores[i] for i in chosen_positions(len(groups))]
        shown = with_scores(shown, **{when: chosen})
    folder.mkdir(parents=True, exist_ok=True)
    write_groups(shown, folder / FILE)


def spread_of_rewards(sets: dict[str, Sequence[Group]]) -> dict[str, Any]:
    """Edges, and counts between them, of the rewards of data sets by name: of the first 100 000
    candidates of each."""
    rewards = {
        name: list(islice(chain.from_iterable(p.rewards.tolist() for p in flat_parts(groups)),
                          _MOST_REWARDS))
        for name, groups in sets.items()
        if len(groups)
    }  # fmt: skip
    edges, counts = reward_bins(rewards)
    return {"edges": edges, "counts": counts} if rewards else {}
