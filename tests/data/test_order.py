"""A strict pair of rewards in a file is a strict pair in training; what is not is counted."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from char_tokenizer import make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrank.data.columns import reward_gap
from fastrank.data.fields import LARGEST_REWARD
from fastrank.data.group import Group
from fastrank.data.load import load_groups
from fastrank.data.pairs import INVERTED
from fastrank.data.readers import from_ranks
from fastrank.data.records import narrowed, read_records, standardized
from fastrank.data.report import (
    AS_ANOTHER,
    CUT_EQUAL,
    FEW_CANDIDATES,
    NOT_TAUGHT,
    SAME_PAIRS,
    Report,
)
from fastrank.data.tokenize import TokenizeOptions
from fastrank.errors import InputError
from fastrank.losses import PRO, RRHF
from fastrank.training.run import warn_of_gaps
from fastrank.workflow.items import as_line, read_items

TINY = 2.0**-149
LARGEST = float(np.finfo(np.float32).max)
numbers = (
    st.floats(-LARGEST, LARGEST)
    | st.floats(-LARGEST_REWARD, LARGEST_REWARD)
    | st.sampled_from([0.1, 0.1000000001, 1e9 + 1, 1e9 + 2, -1e9, 0.0, -0.0, 1e-300, TINY])
    | st.sampled_from([LARGEST, -LARGEST, LARGEST_REWARD, -LARGEST_REWARD, 1e38])
)


def file(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def ranked(*scores: float) -> dict[str, Any]:
    return {"prompt": "p ", "responses": [f"r{i}" for i in range(len(scores))], "scores": scores}


def signs(values: Any) -> list[int]:
    return [(a > b) - (a < b) for a, b in combinations(values, 2)]


@settings(max_examples=100, deadline=None)
@given(st.lists(numbers, min_size=1, max_size=6), st.data())
def test_any_order_survives_float32_and_normalisation(scores: list[float], data: Any) -> None:
    near = [float(np.nextafter(s, data.draw(st.sampled_from([-np.inf, np.inf])))) for s in scores]
    scores += [s for s in near if abs(s) <= LARGEST]
    got = narrowed(scores)
    assert np.array(got, dtype=np.float32).astype(np.float64).tolist() == got or got == scores
    assert signs(np.array(got, dtype=np.float32).tolist()) == signs(scores)
    if signs(np.array(scores, dtype=np.float32).tolist()) == signs(scores):
        assert got == scores
    assert signs(standardized([s / 4 for s in scores])) == signs([s / 4 for s in scores])
    ranks = [abs(s) for s in scores]
    assert signs(from_ranks(ranks)) == [-sign for sign in signs(ranks)]
    scores = [s for s in scores if abs(s) <= LARGEST_REWARD]
    if not scores:
        return
    group = Group([1], [[1]] * len(scores), scores)
    assert group.rewards.dtype == torch.float32
    assert signs(group.rewards.tolist()) == signs(scores)


def test_gaps_stay_as_near_as_float32_allows() -> None:
    assert narrowed([1e9 + 1, 1e9 + 2, 1e9 + 2]) == [0.0, 1.0, 1.0]
    low, high = narrowed([0.1, 0.1000000001])
    assert low == 0 and high == pytest.approx(1e-10, rel=1e-6)
    wide = narrowed([0.0, 1e9 + 1, 1e9 + 2])
    assert wide[0] == 0 and 0 < wide[2] - wide[1] <= 128 and wide[1] == 1e9
    assert narrowed([0.0, 1e-300])[1] >= np.finfo(np.float32).tiny
    wide = narrowed([-LARGEST, np.nextafter(LARGEST, 0), LARGEST])
    assert wide == sorted(set(wide)) and wide[-1] == LARGEST


@pytest.mark.parametrize(
    "rewards",
    [np.array([1e9 + 1, 1e9 + 2]), torch.tensor([1e9 + 1, 1e9 + 2], dtype=torch.float64),
     [10**9 + 1, 10**9 + 2], torch.tensor([10**9 + 1, 10**9 + 2])],
)  # fmt: skip
def test_a_group_keeps_the_order_of_any_kind_of_number(rewards: Any) -> None:
    group = Group([1], [[1], [2]], rewards)
    assert group.rewards.to(torch.float32).tolist() == [0.0, 1.0]
    kept = torch.tensor([0.1, 0.2], dtype=torch.float64)
    assert torch.equal(Group([1], [[1], [2]], kept).rewards, kept)
    scores = [1e9 + 1, 1e9 + 2]
    assert Group([1], [[1], [2]], [0, 1], scores).reference_scores.tolist() == [1e9, 1e9]


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("normalize", ["none", "group"])
def test_every_path_into_training_keeps_the_order(
    cached: bool, normalize: Any, tmp_path: Path
) -> None:
    scores = [[0.1, 0.1000000001, 0.3], [1e9 + 2, 1e9 + 1, 1e9 + 2], [1, 2, 0]]
    path = file(tmp_path, *(ranked(*row) for row in scores))
    options = {"cache_dir": tmp_path / "cache"} if cached else {}
    groups, report = load_groups(path, make_tokenizer(), normalize_rewards=normalize, **options)
    for group, row in zip(groups, scores, strict=True):
        assert group.rewards.dtype == torch.float32
        assert signs(group.rewards.tolist()) == signs(row)
    assert (report.pairs, report.tied_pairs) == (9, 1)


# ---- candidates with the same tokens ----------------------------------------------------------

SAME = {"prompt": "p ", "responses": ["abc", "xy", "abd", "abc"], "scores": [1, 5, 2, 4]}


@pytest.mark.parametrize(
    ("limit", "choice", "expected"),
    [
        (None, "keep", {"abc": [1, 4], "xy": [5], "abd": [2]}),
        (None, "merge", {"abc": [2.5], "xy": [5], "abd": [2]}),
        (None, "drop", {"xy": [5], "abd": [2]}),
        (2, "merge", {"ab": [7 / 3], "xy": [5]}),
        (2, "drop", None),
    ],
)
def test_candidates_with_the_same_tokens(
    limit: int | None, choice: Any, expected: dict[str, list[float]] | None, tmp_path: Path
) -> None:
    path = file(tmp_path, SAME, ranked(2, 1))
    options = TokenizeOptions(max_response_length=limit, same_tokens=choice)
    tokenizer = make_tokenizer()
    groups, report = load_groups(path, tokenizer, options=options)
    assert report.counts[SAME_PAIRS] == [1]
    assert len(report.counts.get(CUT_EQUAL, ())) == (2 if limit else 0)
    assert report.read == 2 and report.candidates_read == 6
    if expected is None:
        assert report.dropped == {FEW_CANDIDATES.format(minimum=2): [1]}
        assert report.candidates_kept == 2 and len(groups) == 1 and report.pairs == 1
        return
    found: dict[str, list[float]] = {}
    for ids, reward in zip(groups[0].response_ids, groups[0].rewards.tolist(), strict=True):
        text = tokenizer.decode(ids).removesuffix("</s>")
        found.setdefault(text, []).append(pytest.approx(reward))
    assert found == expected
    n = sum(map(len, expected.values()))
    assert report.candidates_kept == n + 2 and report.pairs == n * (n - 1) // 2 + 1
    assert len(report.dropped_candidates.get(AS_ANOTHER, ())) == 4 - n
    assert report.candidates_per_group == {2: 2} if n == 2 else {2: 1, n: 1}


def test_the_choice_is_checked() -> None:
    with pytest.raises(InputError, match="same_tokens must be one of keep, merge, drop, got 'x'"):
        TokenizeOptions(same_tokens="x")  # type: ignore[arg-type]


# ---- scores that a format has elsewhere -------------------------------------------------------

PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("more", "columns", "expected", "inverted"),
    [
        ({"score_chosen": 7.5, "score_rejected": 3}, None, [7.5, 3.0], False),
        ({"chosen_score": -1, "rejected_score": -4}, None, [-1.0, -4.0], False),
        ({"score_chosen": 2, "score_rejected": 3}, None, [2.0, 3.0], True),
        ({"score_chosen": 3, "score_rejected": 3}, None, [3.0, 3.0], False),
        ({"score_chosen": 2, "score_rejected": 3}, "score_chosen=", [1.0, 0.0], False),
        ({"score_chosen": "7", "score_rejected": "3"}, None, [1.0, 0.0], False),
        ({"score_chosen": None, "score_rejected": 3}, None, [1.0, 0.0], False),
        ({"score_chosen": 3}, None, [1.0, 0.0], False),
        ({"good": 2, "bad": 1}, "score_chosen=good,score_rejected=bad", [2.0, 1.0], False),
    ],
)
def test_scores_of_a_pair(
    more: dict[str, Any], columns: str | None, expected: Any, inverted: bool, tmp_path: Path
) -> None:
    report = Report()
    path = file(tmp_path, PAIR | more)
    [record] = read_records(path, columns=columns, report=report)
    assert record.scores == expected
    assert report.counts == ({INVERTED: [1]} if inverted else {})


def test_an_infinite_score_of_a_pair_is_an_error(tmp_path: Path) -> None:
    row = PAIR | {"score_chosen": 1e39, "score_rejected": 1}
    with pytest.raises(InputError, match="score_chosen is 1e"):
        list(read_records(file(tmp_path, row)))


@pytest.mark.parametrize(
    ("rewards", "taught", "first", "noted"),
    [
        ([1.0, 1.0, 1.0], 1, "b", False),
        ([0.0, 2.0, 2.0], 2, "c", False),
        ([0.0, 2.0, 1.0], 1, "a", False),
        ([0.0, 2.0, 1.0], 0, "a", True),
        ([0.0, 2.0, 1.0], None, "a", False),
    ],
)
def test_the_response_that_a_pro_file_wants_taught(
    rewards: list[float], taught: int | None, first: str, noted: bool, tmp_path: Path
) -> None:
    row = {"prefix": "p", "suffix": ["a", "b", "c"], "reward": rewards, "sft_index": taught}
    report = Report()
    [record] = read_records(file(tmp_path, row), report=report)
    assert record.responses[0] == first
    # The supervised term takes the first of the best.
    best = record.responses[record.scores.index(max(rewards))]
    assert noted or taught is None or best == "abc"[taught]
    assert [row["suffix"][i] for i in record.positions] == record.responses
    assert report.notes == ({NOT_TAUGHT: [1]} if noted else {})


@pytest.mark.parametrize("taught", [3, -1, "0", [0]])
def test_a_position_that_no_candidate_has(taught: Any, tmp_path: Path) -> None:
    row = {"prefix": "p", "suffix": ["a", "b"], "reward": [1, 0], "sft_index": taught}
    with pytest.raises(InputError, match="sft_index is .*, expected a position in suffix"):
        list(read_records(file(tmp_path, row)))


def test_prompts_of_flat_rows_are_told_apart_by_type(tmp_path: Path) -> None:
    message = [{"role": "user", "content": "x"}]
    prompts = [None, "null", message, json.dumps(message), "x"]
    rows = [{"prompt": p, "response": r, "score": len(r)} for p in prompts for r in ("a", "bb")]
    report = Report()
    records = list(read_records(file(tmp_path, *rows), report=report))
    assert [record.prompt for record in records] == prompts[1:]
    assert all(record.responses == ["a", "bb"] for record in records) and report.read == 5


def test_what_a_field_map_leaves_out_is_not_written(tmp_path: Path) -> None:
    row = ranked(1, 0) | {"context": "C", "system": "S", "note": "n", "kept": "k"}
    path = file(tmp_path, row)
    [item] = read_items(path, columns="context=,system=,note=")
    out = tmp_path / "out.jsonl"
    out.write_text(as_line(item.as_row()))
    [record] = read_records(out)
    assert record.prompt == "p " and record.source["kept"] == "k" and "note" in record.source


def test_the_largest_gap_of_a_group() -> None:
    groups = [Group([1], [[1]] * len(r), r) for r in ([1.0, 5.0], [100.0], [3.0, 3.0, -2.0])]
    assert reward_gap(groups) == 5.0 and reward_gap([]) == 0.0
    assert warn_of_gaps(PRO(), groups) == []
    wide = [*groups, Group([1], [[1], [2]], [0.0, 10.5])]
    [line] = warn_of_gaps(PRO(), wide)
    assert "up to 10.5 apart" in line and "--normalize_rewards group" in line
    assert warn_of_gaps(PRO(stage_scale="one"), wide) == warn_of_gaps(RRHF(), wide) == []
