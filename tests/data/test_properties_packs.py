"""Packs of any groups, token for token, against a construction by loops; and planned ones."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pack_cases import response_labels

from fastrank.data.candidate_packs import candidate_packs
from fastrank.data.packing import Group, Pack, pack
from fastrank.training.batching import plan_step

BUDGET = 60


def masks_of(response: list[int]) -> st.SearchStrategy[list[bool]]:
    """Which tokens of a response are ranked: at least one."""
    return st.lists(st.booleans(), min_size=len(response), max_size=len(response)).filter(any)


@st.composite
def groups_of(draw: Any, referenced: bool | None = None) -> list[Group]:
    """Up to nine groups that each fit into a pack, padded rows included."""
    ids = st.integers(0, 50)
    with_reference = draw(st.booleans()) if referenced is None else referenced
    out = []
    for number in range(draw(st.integers(1, 9))):
        responses = draw(st.lists(st.lists(ids, min_size=1, max_size=7), min_size=1, max_size=4))
        n = len(responses)
        values = st.lists(st.integers(-4, 4).map(float), min_size=n, max_size=n)
        out.append(
            Group(
                draw(st.lists(ids, min_size=1, max_size=8)),
                responses,
                draw(values),
                draw(values) if with_reference else None,
                name=f"g{number}",
                ranked=draw(st.none() | st.tuples(*map(masks_of, responses))),
            )
        )
    return out


def plain_pack(groups: list[Group], shared: bool) -> dict[str, Any]:
    """What a pack of these groups must hold, written out one token at a time."""
    tokens: list[list[int]] = []
    positions: list[list[int]] = []
    rows: list[int] = []
    labels: list[int] = []
    cu_responses, cu_groups = [0], [0]
    if shared:
        tokens.append([])
        positions.append([])
    else:
        width = max(g.longest_sequence for g in groups)
    for group in groups:
        prompt = group.prompt_ids.tolist()
        if shared:
            last_of_prompt = len(tokens[0]) + len(prompt) - 1
            tokens[0] += prompt
            positions[0] += range(len(prompt))
        for response, labelled in zip(
            (ids.tolist() for ids in group.response_ids), response_labels(group), strict=True
        ):
            if shared:
                before = [last_of_prompt, *range(len(tokens[0]), len(tokens[0]) + len(response))]
                tokens[0] += response
                positions[0] += range(len(prompt), len(prompt) + len(response))
            else:
                first = len(tokens) * width + len(prompt) - 1
                before = list(range(first, first + len(response) + 1))
                path = prompt + response
                tokens.append(path + [0] * (width - len(path)))
                positions.append(list(range(width)))
            for row, label in zip(before, labelled.tolist(), strict=False):
                if label >= 0:
                    rows.append(row)
                    labels.append(label)
            cu_responses.append(len(labels))
        cu_groups.append(len(cu_responses) - 1)
    return {
        "input_ids": tokens,
        "position_ids": positions,
        "rows": rows,
        "labels": labels,
        "cu_responses": cu_responses,
        "cu_groups": cu_groups,
        "rewards": [r for g in groups for r in g.rewards.tolist()],
    }


def check(found: Pack, members: list[Group], shared: bool) -> None:
    for name, value in plain_pack(members, shared).items():
        assert getattr(found, name).tolist() == value, name
    assert found.names == tuple(g.name for g in members)
    assert found.num_tokens == sum(len(row) for row in found.input_ids.tolist()) <= BUDGET
    assert found.cu_responses_device.equal(found.cu_responses)
    assert found.cu_groups_device.equal(found.cu_groups)
    if members[0].reference_scores is None:
        assert found.reference_scores is None
    else:
        references = [s for g in members for s in g.reference_scores.tolist()]  # type: ignore[union-attr]
        assert found.reference_scores is not None and found.reference_scores.tolist() == references


def fitting(groups: list[Group], shared: bool) -> list[Group]:
    return [g for g in groups if shared or g.num_candidates * g.longest_sequence <= BUDGET]


@settings(max_examples=150, deadline=None)
@given(groups=groups_of(), shared=st.booleans())
def test_packs_are_written_out_and_partition_the_groups(groups: list[Group], shared: bool) -> None:
    groups = fitting(groups, shared)
    packs = pack(groups, max_tokens=BUDGET, shared_prompts=shared)
    assert sorted(i for p in packs for i in p.group_index) == list(range(len(groups)))
    for found in packs:
        check(found, [groups[i] for i in found.group_index], shared)
    again = pack(groups, max_tokens=BUDGET, shared_prompts=shared)
    assert [p.group_index for p in again] == [p.group_index for p in packs]


@settings(max_examples=100, deadline=None)
@given(groups=groups_of(), data=st.data())
def test_the_given_order_changes_neither_number_nor_fill(
    groups: list[Group], data: st.DataObject
) -> None:
    fills = [
        sorted(p.num_tokens for p in pack(order, max_tokens=BUDGET))
        for order in (groups, data.draw(st.permutations(groups)))
    ]
    assert fills[0] == fills[1]


@settings(max_examples=100, deadline=None)
@given(groups=groups_of(), shared=st.booleans(), world_size=st.integers(1, 4))
def test_a_step_is_cut_into_whole_rounds(
    groups: list[Group], shared: bool, world_size: int
) -> None:
    groups = fitting(groups, shared)
    if not groups:
        return
    plan = plan_step(groups, world_size, max_tokens=BUDGET, shared_prompts=shared)
    assert len(plan) % world_size == 0
    assert sorted(i for members in plan for i in members) == list(range(len(groups)))
    for members in plan:
        if members:
            (found,) = pack([groups[i] for i in members], max_tokens=BUDGET, shared_prompts=shared)
            check(found, [groups[members[i]] for i in found.group_index], shared)
    fewest = len(pack(groups, max_tokens=BUDGET, shared_prompts=shared))
    assert len(plan) <= -(-fewest // world_size) * world_size


@settings(max_examples=100, deadline=None)
@given(groups=groups_of(referenced=False), shared=st.booleans(), data=st.data())
def test_every_live_candidate_is_packed_once(
    groups: list[Group], shared: bool, data: st.DataObject
) -> None:
    """Also where a group is larger than a pack: the budget holds a prompt with one response."""
    count = sum(g.num_candidates for g in groups)
    live = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    budget = data.draw(st.integers(15, 30))
    packs = candidate_packs(groups, max_tokens=budget, shared_prompts=shared, live=live)
    every = [labels[labels >= 0] for g in groups for labels in response_labels(g)]
    flat = [token for ids in every for token in ids.tolist()]
    owner = [c for c, ids in enumerate(every) for _ in ids]
    seen: list[int] = []
    for found, places in packs:
        assert found.num_tokens <= budget
        assert found.labels.tolist() == [flat[i] for i in places.tolist()]
        seen += places.tolist()
    assert sorted(seen) == [i for i, c in enumerate(owner) if live[c]]


def test_the_cases_fill_several_packs() -> None:
    """A budget that always held everything would prove nothing."""
    groups = [Group([1] * 8, [[2] * 7] * 4, [0.0] * 4) for _ in range(9)]
    assert len(pack(groups, max_tokens=BUDGET)) == 9
    with pytest.raises(ValueError, match="must fit into max_tokens=35"):
        pack(groups, max_tokens=35)
