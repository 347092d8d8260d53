"""Scores, losses and gradients are of the ranked tokens of a response alone; the others, turns of
a user or a tool inside a candidate, are context. The reference is a loop over the candidates, each
in a row of its own, with labels of −100 there."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
import torch
from architectures import build
from pack_cases import (
    LARGE,
    assert_same_gradients,
    one_pack,
    random_groups,
    response_labels,
    separate_loss,
    separate_scores,
    take_gradients,
)

import fastrank
from fastrank import Group
from fastrank.data.columns import flat_parts, group_sizes, groups_digest, tokens_digest
from fastrank.modeling.cost import PackCost
from fastrank.modeling.reference_scores import with_reference_scores
from fastrank.training.two_phase import two_phase_backward

LOSSES = [
    fastrank.RRHF(),
    fastrank.RRHF(margin=0.4, sft_reduction="sum"),
    fastrank.PRO(),
    fastrank.DPO(),
]


def masked_groups(references: bool = False) -> list[Group]:
    groups = random_groups(LARGE, references=references, masked=True, name="data")
    return [replace(group, rewards=group.rewards.double()) for group in groups]


@pytest.mark.parametrize("shared_prompts", [True, False])
def test_losses_and_gradients_are_those_of_a_loop_with_labels_of_minus_100(shared_prompts):
    # GPT-2 stays in float64 throughout.
    plain = build("gpt2", dtype=torch.float64).train()
    model = fastrank.prepare_model(
        build("gpt2", dtype=torch.float64).train(), shared_prompts=shared_prompts
    )
    for loss in LOSSES:
        groups = masked_groups(loss.uses_reference)
        expected = separate_loss(plain, groups, loss)
        expected.backward()
        gradients = take_gradients(plain)
        output = model(pack=one_pack(groups, shared_prompts=shared_prompts), loss=loss)
        torch.testing.assert_close(output.loss, expected)
        (3.0 * output.loss).backward()
        found = {name: grad / 3.0 for name, grad in take_gradients(model).items()}
        assert_same_gradients(found, gradients, 1e-10)
        # Packs smaller than a group: candidates are scored and run again apart from each other.
        phases = two_phase_backward(model, groups, loss=loss, max_tokens=24, score_tokens=40)
        torch.testing.assert_close(phases.loss, expected)
        assert_same_gradients(take_gradients(model), gradients, 1e-10)
        assert phases.token_logprobs.shape == output.token_logprobs.shape
        counts = [sum(labels >= 0) for g in groups for labels in response_labels(g)]
        assert sum(counts) == len(output.token_logprobs)


def test_scores_of_a_model_and_of_a_reference_count_ranked_tokens(tmp_path):
    model = build("llama").eval()
    groups = masked_groups()
    with torch.no_grad():
        expected = separate_scores(model, groups)
        found = fastrank.score(model, groups, max_tokens=24)  # groups in parts
    torch.testing.assert_close(torch.cat(found), expected.float(), atol=1e-5, rtol=1e-5)
    with_reference = with_reference_scores(groups, model, normalize="mean")
    for group, scored, own in zip(groups, with_reference, found, strict=True):
        torch.testing.assert_close(scored.reference_scores, own, atol=1e-5, rtol=1e-5)
        assert (scored.ranked is None) == (group.ranked is None)


def test_what_stands_for_a_group_tells_its_mask():
    groups = masked_groups()
    bare = [replace(group, ranked=None) for group in groups]
    assert groups[0].ranked is None and all(group.ranked for group in groups[1:])
    for digest in (groups_digest, tokens_digest):
        assert digest(groups[:1]) == digest(bare[:1])
        assert digest(groups) != digest(bare)
        assert len({digest([a]) for a in (*groups[1:], *bare[1:])}) == 2 * len(groups[1:])
    for group, part in zip(groups, flat_parts(groups), strict=True):
        marked = torch.from_numpy(part.response_ids).split(part.response_lengths.tolist())
        for again in (
            pickle.loads(pickle.dumps(group)),
            Group.of_marked(group.prompt_ids, marked, group.rewards, group.name),
        ):
            assert torch.equal(torch.cat(again.response_ids), torch.cat(group.response_ids))
            assert (again.ranked is None) == (group.ranked is None)
            for mask, other in zip(again.ranked or (), group.ranked or (), strict=True):
                assert torch.equal(mask, other)
        turned = group.take([-1, 0])
        assert torch.equal(turned.marked[0], group.marked[-1])
    sizes, plain = group_sizes(groups), group_sizes(bare)
    assert sizes.num_tokens.tolist() == plain.num_tokens.tolist()
    assert sizes.num_labels.tolist() == [sum(group.label_counts) for group in groups]
    # Context costs what every token costs, but no row of the head.
    head = PackCost(0.0, 0.0, 2.0)
    assert head.of_groups(sizes, True).tolist() == [2.0 * sum(g.label_counts) for g in groups]
    everything = Group([1], ([2, 3], [4]), [0.0, 1.0], ranked=((True, True), [True]))
    assert everything.ranked is None


@pytest.mark.parametrize(
    ("ranked", "expected"),
    [
        (([True, False],), "ranked must have one mask for each of 2 responses, got 1"),
        (([True], [True]), r"ranked\[0\] must have shape \(2,\), got \(1,\)"),
        (([True, True], [False]), r"ranked\[1\] must have at least one True, got none"),
    ],
)
def test_masks_that_do_not_fit_are_refused(ranked, expected):
    with pytest.raises(ValueError, match=expected):
        Group([1], ([2, 3], [4]), [0.0, 1.0], ranked=ranked)
