"""The held-out prompts that a run keeps for its report, with scores before and after."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from fastrank.data.group import Group
from fastrank.tasks.menu import word_tokenizer
from fastrank.training.held_out import keep_scores, spread_of_rewards
from fastrank.visual import shown_groups
from fastrank.visual.shown_groups import FILE, read_groups


def test_scores_before_and_after(
    menu_groups: list[Group], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run finds those from before; other data begins anew; of many prompts some stay."""
    monkeypatch.setattr(shown_groups, "MOST", 4)
    tokenizer, groups = word_tokenizer(), menu_groups[:9]
    before = [[float(i)] * g.num_candidates for i, g in enumerate(groups)]
    before[0][1] = -math.inf
    keep_scores(tmp_path, groups, tokenizer, before, "before")
    kept = read_groups(tmp_path / FILE)
    assert [g.before[0] for g in kept] == [0.0, 2.0, 4.0, 6.0]
    assert kept[0].before[1] is None and kept[0].after is None
    assert kept[1].prompt == tokenizer.decode(groups[2].prompt_ids.tolist())
    assert kept[1].rewards == groups[2].rewards.tolist()
    whole = tokenizer.decode([*groups[2].prompt_ids.tolist(), *groups[2].response_ids[1].tolist()])
    assert kept[1].prompt + kept[1].responses[1] == whole
    after = [[9.0] * g.num_candidates for g in groups]
    keep_scores(tmp_path, groups, tokenizer, after, "after")
    keep_scores(tmp_path, groups, tokenizer, None, "after")  # a finished run, resumed
    both = read_groups(tmp_path / FILE)
    assert [g.before for g in both] == [g.before for g in kept]
    assert {g.after[0] for g in both} == {9.0}
    keep_scores(tmp_path, menu_groups[9:12], tokenizer, after[:3], "after")
    assert [g.before for g in read_groups(tmp_path / FILE)] == [None] * 3


def test_the_spread_of_rewards(menu_groups: list[Group]) -> None:
    found = spread_of_rewards({"training": menu_groups, "held out": []})
    counts = found["counts"]["training"]
    assert (
        sum(counts) == sum(g.num_candidates for g in menu_groups)
        and "held out" not in found["counts"]
    )
    lowest = sum(
        int((g.rewards == min(h.rewards.min() for h in menu_groups)).sum()) for g in menu_groups
    )
    assert counts[0] == lowest and spread_of_rewards({"training": []}) == {}
