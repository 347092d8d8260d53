"""Groups, packs and the filling of packs."""

from __future__ import annotations

import gc
import random
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrank.attention.segments import SegmentTable
from fastrank.data.bins import best_fit
from fastrank.data.packing import Group, pack


def group(prompt: int, responses: list[int], start: int = 1, **options) -> Group:
    """Tokens counted upwards from ``start``, so that every token says where it comes from."""
    tokens = iter(range(start, start + prompt + sum(responses)))
    ids = [[next(tokens) for _ in range(n)] for n in (prompt, *responses)]
    return Group(ids[0], ids[1:], [float(i) for i in range(len(responses))], **options)


def test_a_shared_pack_is_written_out():
    groups = [group(3, [2, 1], start=10), group(1, [1, 3], start=20)]
    (only,) = pack(groups, max_tokens=11)
    assert only.input_ids.tolist() == [[10, 11, 12, 13, 14, 15, 20, 21, 22, 23, 24]]
    assert only.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 0, 1, 1, 2, 3]]
    # The prompt's last row predicts the first token of each of its responses.
    assert only.rows.tolist() == [2, 3, 2, 6, 6, 8, 9]
    assert only.labels.tolist() == [13, 14, 15, 21, 22, 23, 24]
    assert only.cu_responses.tolist() == [0, 2, 3, 4, 7]
    assert only.cu_groups.tolist() == [0, 2, 4]
    assert only.rewards.tolist() == [0.0, 1.0, 0.0, 1.0]
    assert only.cu_groups.dtype == only.cu_responses.dtype == torch.int32
    assert only.input_ids.dtype == only.rows.dtype == only.labels.dtype == torch.int64
    assert (only.num_groups, only.num_candidates, only.num_tokens) == (2, 4, 11)
    assert only.sequence_lengths == (5, 4, 2, 4) and only.group_index == (0, 1)
    assert only.shared_prompts and only.segments.longest_sequence == 5


def test_a_padded_pack_is_written_out():
    groups = [group(3, [2, 1], start=10), group(1, [1, 3], start=20)]
    (only,) = pack(groups, max_tokens=20, shared_prompts=False)
    assert only.input_ids.tolist() == [
        [10, 11, 12, 13, 14], [10, 11, 12, 15, 0], [20, 21, 0, 0, 0], [20, 22, 23, 24, 0]
    ]  # fmt: skip
    assert only.rows.tolist() == [2, 3, 7, 10, 15, 16, 17]
    assert only.labels.tolist() == [13, 14, 15, 21, 22, 23, 24]
    assert only.position_ids.tolist() == [[0, 1, 2, 3, 4]] * 4
    assert only.num_tokens == 20 and not only.shared_prompts and only.segments is None


SHAPES = st.lists(
    st.tuples(st.integers(1, 9), st.lists(st.integers(1, 7), min_size=1, max_size=5)),
    min_size=1,
    max_size=12,
)


@settings(max_examples=120, deadline=None)
@given(shapes=SHAPES, budget=st.integers(54, 130), shared=st.booleans())
def test_packs_hold_every_group_once_and_whole(shapes, budget, shared):
    groups = [group(p, r, start=100 * i) for i, (p, r) in enumerate(shapes)]
    groups = [g for g in groups if shared or g.num_candidates * g.longest_sequence <= budget]
    packs = pack(groups, max_tokens=budget, shared_prompts=shared)
    assert sorted(i for p in packs for i in p.group_index) == list(range(len(groups)))
    for p in packs:
        assert p.num_tokens <= budget
        flat, positions = p.input_ids.view(-1), p.position_ids.view(-1)
        members = [groups[i] for i in p.group_index]
        responses = [(g, r) for g in members for r in g.response_ids]
        assert len(responses) == p.num_candidates
        for c, (g, response) in enumerate(responses):
            at = slice(int(p.cu_responses[c]), int(p.cu_responses[c + 1]))
            assert torch.equal(p.labels[at], response)
            # The row before each label holds the token before it, at the position before it.
            path = torch.cat((g.prompt_ids, response))
            first = len(g.prompt_ids) - 1
            assert torch.equal(flat[p.rows[at]], path[first:-1])
            assert positions[p.rows[at]].tolist() == list(range(first, len(path) - 1))


def test_packing_is_deterministic_and_best_fit():
    sizes = [3, 9, 4, 10, 1, 6, 7, 2]
    assert best_fit(sizes, 10) == [[3], [1, 4], [0, 6], [2, 5], [7]]
    assert best_fit(sizes, 10) == best_fit(list(sizes), 10)
    assert best_fit([], 10) == []


@settings(max_examples=200, deadline=None)
@given(sizes=st.lists(st.integers(1, 1500), max_size=60), spare=st.integers(0, 900))
def test_bins_equal_a_search_of_all_bins(sizes, spare):
    capacity = max(sizes, default=1) + spare
    bins: list[list[int]] = []
    space: list[int] = []
    for item in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        fitting = [b for b in range(len(bins)) if space[b] >= sizes[item]]
        if not fitting:
            bins.append([])
            space.append(capacity)
            fitting = [len(bins) - 1]
        best = min(fitting, key=lambda b: space[b])
        bins[best].append(item)
        space[best] -= sizes[item]
    found = best_fit(sizes, capacity)
    fill = sorted(sum(sizes[i] for i in b) for b in found)
    assert fill == sorted(sum(sizes[i] for i in b) for b in bins)


def test_packs_are_full_and_made_in_linear_time():
    rng = random.Random(0)
    sizes = [min(16384, 20 + int(rng.lognormvariate(6.3, 0.9))) for _ in range(80000)]
    seconds = {}
    gc.collect()
    gc.disable()  # what earlier tests left is walked through again and again, in the larger run
    try:
        for count in (10000, 80000):
            taken = []
            for _ in range(3):
                start = time.process_time()
                bins = best_fit(sizes[:count], 16384)
                taken.append(time.process_time() - start)
            seconds[count] = min(taken)
            assert sum(sizes[:count]) >= 0.95 * 16384 * len(bins)
    finally:
        gc.enable()
    assert seconds[80000] < 8 * 4 * seconds[10000] + 0.05  # eight times the work, with room


def test_packs_of_real_lengths_are_full(oasst_path):
    import json

    groups = []
    for line in oasst_path.read_text().splitlines():
        record = json.loads(line)
        prompt = record["prompt"] if isinstance(record["prompt"], str) else str(record["prompt"])
        lengths = [max(1, len(r) // 4) for r in record["responses"]]
        groups.append((max(1, len(prompt) // 4), lengths))
    sizes = [p + sum(r) for p, r in groups]
    bins = best_fit(sizes, 16384)
    # The last pack of so few lists holds what is left over; all others must be full.
    fills = sorted((sum(sizes[i] for i in b) / 16384 for b in bins), reverse=True)
    assert np.mean(fills[:-1]) >= 0.95


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], [[1]], [0.0]), "x:3: prompt_ids must be a sequence of at least one token"),
        (([1], [[]], [0.0]), r"x:3: response_ids\[0\] must be a sequence of at least one token"),
        (([1], [], []), "x:3: response_ids must hold at least one response"),
        (([1], [[2], [-3]], [0.0, 1.0]), r"response_ids\[1\] must not be negative, got -3"),
        (([1], [[2], [3]], [0.0]), r"rewards must have one value for each of 2 responses"),
        (([1], [[2], [3]], [0.0, float("nan")]), "rewards must be finite"),
        (([1], [[2], [3]], [0.0, float("inf")]), "rewards must be finite"),
        (([1], [[2], [3]], [0.0, -3e38]), r"rewards must lie within ±1e\+15, got"),
        (([1], [[2], [3]], torch.tensor([1e300, 0.0]).double()), "rewards must "),
        (([[1]], [[2]], [0.0]), "prompt_ids must be a sequence"),
    ],
)
def test_bad_groups_name_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        Group(*arguments, name="x:3")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.5], [[2]], [0.0]), "prompt_ids must be integers"),
        (("text", [[2]], [0.0]), "prompt_ids must be token ids, got a text: tokenise it first"),
        (([1], ["text"], [0.0]), r"response_ids\[0\] must be token ids, got a text: tokenise"),
        (([1], "text", [0.0]), "response_ids must be sequences of token ids, got str"),
        (([1], None, [0.0]), "response_ids must be sequences of token ids, got NoneType"),
        ((None, [[2]], [0.0]), "prompt_ids must be integers that int64 holds, got NoneType"),
        (([[1], [2, 3]], [[2]], [0.0]), "prompt_ids must be integers that int64 holds, got list"),
        (([1, 2**70], [[2]], [0.0]), "prompt_ids must be integers that int64 holds, got list"),
        (([1], [[2]], "high"), "rewards must be numbers, got 'high'"),
    ],
)
def test_tokens_must_be_integers(arguments, message):
    with pytest.raises(TypeError, match=message):
        Group(*arguments)


def test_whatever_takes_groups_says_that_it_got_none():
    from fastrank import RRHF, prepare_model, score, two_phase_backward
    from fastrank.tasks.menu import tiny_llama

    model, group = prepare_model(tiny_llama(0)), Group([1], [[2], [3]], [0.0, 1.0])
    (chosen,) = pack([group], max_tokens=9)
    takers = {
        "pack": lambda groups, **size: pack(groups, **{"max_tokens": 9, **size}),
        "score": lambda groups, **size: score(model, groups, **size),
        "backward": lambda groups, **size: two_phase_backward(
            model, groups, loss=RRHF(), **{"max_tokens": 9, **size}
        ),
    }
    for call in takers.values():
        for wrong, name in ((group, "Group"), (None, "NoneType"), (3, "int")):
            with pytest.raises(TypeError, match=f"groups must be a sequence of Groups, got {name}"):
                call(wrong)
        with pytest.raises(TypeError, match=r"groups\[1\] must be a Group \(.*\), got dict"):
            call([group, {"prompt": "a", "responses": ["b"], "scores": [1.0]}])
        for size in ("9", 9.5, None, True):
            with pytest.raises(TypeError, match="max_tokens must be an integer, got"):
                call([group], max_tokens=size)
        with pytest.raises(ValueError, match="max_tokens must be at least 1, got -1"):
            call([group], max_tokens=-1)
    for number, error in ((-1, ValueError), (1.5, TypeError), ("2", TypeError)):
        with pytest.raises(error, match="num_groups must be "):
            takers["backward"]([group], num_groups=number)
    for wrong, name in (([chosen], "list"), (group, "Group"), ("text", "str")):
        with pytest.raises(
            TypeError, match=rf"pack must be one of fastrank.pack\(...\), got {name}"
        ):
            model(pack=wrong)
    with pytest.raises(TypeError, match="loss must be a fastrank loss such as .* got str"):
        model(pack=chosen, loss="rrhf")


def test_reference_scores_are_checked():
    with pytest.raises(ValueError, match="reference_scores must have one value"):
        Group([1], [[2], [3]], [0.0, 1.0], reference_scores=[1.0])
    both = [group(1, [1]), group(1, [1], reference_scores=[0.5])]
    with pytest.raises(ValueError, match="every group or for none, got 1 of 2"):
        pack(both, max_tokens=10)
    (only,) = pack([both[1], both[1]], max_tokens=10)
    assert only.reference_scores.tolist() == [0.5, 0.5]


def test_rewards_keep_float64_and_accept_arrays():
    assert Group([1], [[2]], np.array([0.25])).rewards.dtype == torch.float64
    assert Group(np.array([1], dtype=np.int32), [torch.tensor([2])], [1]).rewards.dtype == (
        torch.float32
    )


def test_a_group_that_does_not_fit_is_named():
    large = group(5, [3, 3], name="data.jsonl:17")
    with pytest.raises(ValueError, match=r"data.jsonl:17: must fit into max_tokens=10, got 11"):
        pack([group(1, [1]), large], max_tokens=10)
    with pytest.raises(ValueError, match=r"got 16 padded tokens"):
        pack([large], max_tokens=15, shared_prompts=False)
    with pytest.raises(ValueError, match="group 1: must fit"):
        pack([group(1, [1]), group(50, [1])], max_tokens=10)
    with pytest.raises(ValueError, match="max_tokens must be at least 1"):
        pack([], max_tokens=0)


def test_a_token_outside_the_vocabulary_is_named():
    with pytest.raises(ValueError, match="group 0: token ids must lie below vocab_size=3, got 3"):
        pack([group(1, [2])], max_tokens=10, vocab_size=3)
    assert len(pack([group(1, [2])], max_tokens=10, vocab_size=4)) == 1


def test_auto_shares_where_it_saves_tokens():
    from fastrank.data.packing import sharing_pays

    short, long = group(1, [40, 40, 40]), group(60, [40, 40, 40])
    ragged = group(1, [10, 40, 40])  # padding counts as much as prompts
    assert [sharing_pays([g])[0] for g in (short, long, ragged)] == [False, True, True]
    assert "1.02 times the tokens of shared ones, less than the 1.08" in sharing_pays([short])[1]
    for groups, shared in (([short], False), ([long], True), ([short, long], True)):
        (only,) = pack(groups, max_tokens=500, shared_prompts="auto")
        assert only.shared_prompts is shared
    # 123 padded tokens would not fit.
    (only,) = pack([short], max_tokens=122, shared_prompts="auto")
    assert only.shared_prompts
    assert pack([], max_tokens=5, shared_prompts="auto") == []


def test_no_groups_make_no_packs():
    assert pack([], max_tokens=10) == []


def test_a_pack_moves_its_tensors_and_keeps_its_offsets():
    (only,) = pack([group(2, [1, 2])], max_tokens=10)
    moved = only.to("meta")
    assert moved.input_ids.is_meta and moved.cu_groups_device.is_meta and moved.rewards.is_meta
    assert not moved.cu_groups.is_meta and not moved.cu_responses.is_meta
    assert moved.segments is only.segments and only.device.type == "cpu"


def test_segments_refuse_empty_ones():
    with pytest.raises(ValueError, match="segment lengths must be at least 1"):
        SegmentTable.from_lengths([(3, [0])])
