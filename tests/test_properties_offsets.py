"""Rows, labels and offsets: from a padded batch and back, and through the fused loss."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastrank

IGNORE = -100


@st.composite
def padded_labels(draw: Any) -> torch.Tensor:
    """int64 [B, L]: labels anywhere but at position 0, at least one per row, holes between them."""
    rows, length = draw(st.integers(1, 5)), draw(st.integers(2, 9))
    labels = torch.full((rows, length), IGNORE)
    for row in range(rows):
        places = draw(st.sets(st.integers(1, length - 1), min_size=1))
        for place in places:
            labels[row, place] = draw(st.integers(0, 12))
    return labels


@settings(max_examples=150, deadline=None)
@given(labels=padded_labels())
def test_flatten_is_the_loop_over_all_places(labels: torch.Tensor) -> None:
    hidden = torch.zeros(*labels.shape, 3)
    rows, flat, offsets = fastrank.flatten(hidden, labels)
    expected_rows, expected_labels, expected_offsets = [], [], [0]
    for row, line in enumerate(labels.tolist()):
        for place, label in enumerate(line):
            if label != IGNORE:
                expected_rows.append(row * len(line) + place - 1)
                expected_labels.append(label)
        expected_offsets.append(len(expected_labels))
    assert rows.tolist() == expected_rows and flat.tolist() == expected_labels
    assert offsets.tolist() == expected_offsets and offsets.dtype == torch.int32


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=9),
    normalize=st.sampled_from(["mean", "sum"]),
    seed=st.integers(0, 1000),
)
def test_sequence_scores_are_the_sums_of_their_own_tokens(
    lengths: list[int], normalize: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(sum(lengths), dtype=torch.float64, generator=generator).requires_grad_()
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    upstream = torch.randn(len(lengths), dtype=torch.float64, generator=generator)
    scores = fastrank.sequence_scores(values, offsets, normalize=normalize)
    (gradient,) = torch.autograd.grad((scores * upstream).sum(), values)
    for i, part in enumerate(values.detach().split(lengths)):
        share = 1.0 if normalize == "sum" else 1.0 / lengths[i]
        torch.testing.assert_close(scores[i].detach(), part.sum() * share)
    shares = [u if normalize == "sum" else u / n for u, n in zip(upstream, lengths, strict=True)]
    want = torch.stack(shares).repeat_interleave(torch.tensor(lengths))
    torch.testing.assert_close(gradient, want)


LOSSES = st.sampled_from(
    [
        fastrank.RRHF(),
        fastrank.RRHF(margin=0.3, sft_reduction="sum"),
        fastrank.PRO(),
        fastrank.DPO(sft_weight=0.5),
        fastrank.LambdaRank(),
        fastrank.ListMLE(normalize="sum"),
        fastrank.ListNet(sft_weight=1.0),
    ]
)


@settings(max_examples=80, deadline=None)
@given(
    loss=LOSSES,
    groups=st.lists(
        st.lists(st.tuples(st.integers(1, 5), st.integers(0, 3)), min_size=1, max_size=4),
        min_size=1,
        max_size=4,
    ),
    memory=st.sampled_from([1, 2_000, 1 << 20]),
    reduction=st.sampled_from(["mean", "sum"]),
    seed=st.integers(0, 1000),
)
def test_the_fused_loss_is_its_parts_for_any_offsets(
    loss: fastrank.Loss,
    groups: list[list[tuple[int, int]]],
    memory: int,
    reduction: str,
    seed: int,
) -> None:
    """(length, reward) a candidate; hidden rows repeat; chunks of one group up to all."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    lengths = [length for group in groups for length, _ in group]
    rewards = torch.tensor([float(r) for group in groups for _, r in group], dtype=torch.float64)
    cu_responses = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    cu_groups = torch.tensor([0, *itertools.accumulate(map(len, groups))], dtype=torch.int32)
    total, rows_there, vocabulary = sum(lengths), max(1, sum(lengths) // 2), 11
    hidden, weight = random(rows_there, 4), random(vocabulary, 4)
    rows = torch.randint(0, rows_there, (total,), generator=generator)
    labels = torch.randint(0, vocabulary, (total,), generator=generator)

    def gradients(value: torch.Tensor, *of: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(value * 1.7, of)

    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    fused = fastrank.linear_ranking_loss(
        h, w, labels, rewards, cu_responses=cu_responses, cu_groups=cu_groups, loss=loss,
        rows=rows, reduction=reduction, logits_memory=memory,
    )  # fmt: skip
    got = gradients(fused.loss, h, w)

    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logp = torch.log_softmax(h[rows] @ w.T, -1).gather(1, labels[:, None]).squeeze(1)
    parts = logp.split(lengths)
    scores = torch.stack([p.mean() if loss.normalize == "mean" else p.sum() for p in parts])
    ranked = fastrank.ranking_loss(scores, rewards, loss=loss, cu_groups=cu_groups, reduction="sum")
    supervised = torch.zeros((), dtype=torch.float64)
    for a, b in itertools.pairwise(cu_groups.tolist()):
        best = max(range(a, b), key=lambda i: (rewards[i].item(), -i))
        growth = (b - a - 1) ** 2 if isinstance(loss, fastrank.PRO) else 1
        own = parts[best].sum() if loss.sft_reduction == "sum" else parts[best].mean()
        supervised = supervised - loss.sft_weight * growth * own
    plain = (ranked + supervised) / (len(groups) if reduction == "mean" else 1)
    torch.testing.assert_close(fused.loss.detach(), plain.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(fused.scores.double(), scores.detach(), rtol=1e-9, atol=1e-9)
    for mine, other in zip(got, gradients(plain, h, w), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)
