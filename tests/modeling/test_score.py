"""Scores of candidates in the given order, from any model, which is left as it was."""

from __future__ import annotations

import pytest
import torch
from architectures import build
from pack_cases import random_groups, separate_scores

import fastrank
from fastrank.modeling.prepare import prepared_state

SHAPES = [(7, [3, 1, 9]), (1, [4, 2]), (12, [5]), (4, [6, 6, 2, 11]), (9, [8, 8])]


@pytest.mark.parametrize("model_type", ["qwen3", "gemma2", "mamba"])
@pytest.mark.parametrize("max_tokens", [64, 4096])
def test_scores_come_in_the_order_of_the_groups(model_type, max_tokens):
    model = build(model_type)
    groups = random_groups(SHAPES)
    expected = separate_scores(model, groups).detach().split([len(r) for _, r in SHAPES])
    before = dict(vars(model))
    model.train()
    found = fastrank.score(model, groups, max_tokens=max_tokens)
    assert model.training and prepared_state(model) is None and vars(model).keys() == before.keys()
    assert [scores.dtype for scores in found] == [torch.float32] * len(groups)
    for scores, reference in zip(found, expected, strict=True):
        assert not scores.requires_grad
        torch.testing.assert_close(scores, reference, atol=1e-5, rtol=0)


def test_sums_are_means_times_lengths():
    model = build("llama")
    groups = random_groups(SHAPES)
    means, sums = (fastrank.score(model, groups, normalize=n) for n in ("mean", "sum"))
    for mean, total, group in zip(means, sums, groups, strict=True):
        lengths = torch.tensor([len(ids) for ids in group.response_ids])
        torch.testing.assert_close(mean * lengths, total, atol=1e-4, rtol=1e-5)


def test_a_prepared_model_stays_prepared():
    model = fastrank.prepare_model(build("llama"))
    state = prepared_state(model)
    fastrank.score(model, random_groups(SHAPES))
    assert prepared_state(model) is state


def test_dropout_does_not_stand_in_the_way_of_scoring():
    model = build("gpt2", attn_pdrop=0.5, resid_pdrop=0.5)
    groups = random_groups(SHAPES)
    expected = separate_scores(model, groups).detach()
    found = torch.cat(fastrank.score(model.train(), groups))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert model.training


@pytest.mark.parametrize("shared_prompts", [True, False])
def test_groups_larger_than_a_pack_are_scored_in_parts(shared_prompts):
    groups = random_groups([(7, [3, 1, 9]), (4, [6, 6, 2, 11, 5, 5, 7]), (9, [15, 3, 8]), (2, [3])])
    model = build("llama")
    expected = separate_scores(model, groups).detach()
    fastrank.prepare_model(model, shared_prompts=shared_prompts)
    found = fastrank.score(model, groups, max_tokens=24)
    assert [len(scores) for scores in found] == [3, 7, 3, 1]
    torch.testing.assert_close(torch.cat(found), expected, atol=1e-5, rtol=0)


def test_no_groups_have_no_scores():
    assert fastrank.score(build("llama"), []) == []


def test_bad_groups_are_named():
    model = build("llama")
    with pytest.raises(ValueError, match=r"group 1: prompt and response 1 must fit .*=20"):
        fastrank.score(model, random_groups([(3, [2]), (20, [3, 4])]), max_tokens=20)
    with pytest.raises(ValueError, match="group 0: token ids must lie below vocab_size=61"):
        fastrank.score(model, [fastrank.Group([61], [[1]], [0.0])])
    with pytest.raises(ValueError, match="context of 64 tokens, got 70"):
        fastrank.score(model, random_groups([(60, [10])]))
