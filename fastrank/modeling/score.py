"""Scores of candidates: their mean or summed log-probability under a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastrank.arguments import Normalize
from fastrank.attention.gate import refusal
from fastrank.data.candidate_packs import split_groups
from fastrank.data.columns import group_sizes
from fastrank.data.group import check_groups
from fastrank.data.packing import Group, pack
from fastrank.modeling.prepare import prepare_model, prepared_state, release_model
from fastrank.modeling.unwrap import causal_lm, evaluation_mode, unwrap, vocab_size


def score(
    model: nn.Module,
    groups: Sequence[Group],
    *,
    max_tokens: int = 16384,
    normalize: Normalize = "mean",
) -> list[Tensor]:
    """Score every candidate of every group, without gradients and in evaluation mode.

    A model that is not prepared is prepared for this call and released after it, with shared
    prompts where it supports them.

    Args:
        model: a transformers causal language model, prepared or not; a prepared one may be wrapped.
        groups: tokenised candidates.
        max_tokens: maximum tokens per pack, see `fastrank.pack`; larger groups are split.
        normalize: ``"mean"`` or ``"sum"`` of a response's token log-probabilities, or α >= 0 for
            their sum over ``|y|^α``.

    Returns:
        One float32 [n] per group, on the host, in the given order.

    Raises:
        ValueError: a prompt with one of its responses exceeds ``max_tokens`` or the model's
            context.
    """
    state = prepared_state(model)
    if state is None:
        with evaluation_mode(model):
            prepare_model(model, shared_prompts=refusal(causal_lm(model)) is None)
        try:
            return score(model, groups, max_tokens=max_tokens, normalize=normalize)
        finally:
            release_model(model)
    groups = check_groups(groups)
    parts = split_groups(groups, max_tokens=max_tokens, shared_prompts=state.shared_prompts)
    packs = pack(
        [part.group for part in parts],
        max_tokens=max_tokens,
        shared_prompts="auto" if state.shared_prompts else False,
        vocab_size=vocab_size(causal_lm(unwrap(model))),
    )
    scores = [torch.empty(group.num_candidates) for group in groups]
    with torch.no_grad(), evaluation_mode(model):
        for chosen in packs:
            found = model(pack=chosen, normalize=normalize).scores.float().cpu()
            sizes = (chosen.cu_groups[1:] - chosen.cu_groups[:-1]).tolist()
            for index, values in zip(chosen.group_index, found.split(sizes), strict=True):
                scores[parts[index].index][list(parts[index].members)] = values
    return scores


def enough_tokens(groups: Sequence[Group], max_tokens: int) -> int:
    """``max_tokens``, raised to the longest sequence of the groups if that is longer."""
    return max(max_tokens, int(group_sizes(groups).longest_sequence.max(initial=0)))
