"""The papers' scripts, written anew, against their formulas in plain Python."""

from __future__ import annotations

import math

import pytest
import torch

from fastrank.benchmarks.loss_formulas import (
    IGNORED,
    published_pro,
    published_rrhf,
    ranking_term,
)

LENGTHS, LENGTH, VOCAB = [2, 3, 1], 6, 11


@pytest.fixture
def prompt():
    """Logits [n, L, V] and shifted labels [n, L] of one prompt of two tokens, ragged responses."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(3, LENGTH, VOCAB, generator=generator, dtype=torch.float64)
    labels = torch.full((3, LENGTH), IGNORED)
    for i, length in enumerate(LENGTHS):
        labels[i, 1 : 1 + length] = torch.randint(VOCAB, (length,), generator=generator)
    return logits, labels


def token_logprobs(logits, labels, row):
    for t, label in enumerate(labels[row].tolist()):
        if label != IGNORED:
            z = logits[row, t].tolist()
            yield z[label] - math.log(sum(math.exp(v) for v in z))


def test_rrhf_divides_by_the_padded_length(prompt):
    logits, labels = prompt
    rewards = torch.tensor([0.2, 0.9, 0.5])
    scores = [sum(token_logprobs(logits, labels, i)) / LENGTH for i in range(3)]
    expected = -scores[1]  # the best candidate's mean over padded positions
    for i in range(3):
        for j in range(3):
            if rewards[i] < rewards[j]:
                expected += max(0.0, scores[i] - scores[j])
    got = published_rrhf(logits, labels, rewards)
    assert got.item() == pytest.approx(expected, rel=1e-12)


def test_pro_takes_one_forward_pass_per_candidate(prompt):
    logits, labels = prompt
    rewards = torch.tensor([0.9, 0.5, 0.2], dtype=torch.float64)
    calls = []

    def forward(i):
        calls.append(i)
        return logits[i : i + 1]

    forwards = [lambda i=i: forward(i) for i in range(3)]
    got = published_pro(forwards, labels, rewards)
    assert calls == [0, 1, 2]
    sums = [sum(token_logprobs(logits, labels, i)) for i in range(3)]
    scores = [total / length for total, length in zip(sums, LENGTHS, strict=True)]
    expected = -0.05 * 2**2 * sums[0]
    for k in range(2):
        gaps = [rewards[k].item() - rewards[i].item() for i in range(k + 1, 3)]
        own = scores[k] * max(gaps)
        others = [math.exp(scores[k + 1 + i] * gap) for i, gap in enumerate(gaps)]
        expected += math.log(1e-10 + math.exp(own) + sum(others)) - own
    assert got.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("loss", ["rrhf", "pro"])
def test_plain_and_fastrank_agree_in_float64(loss: str):
    """Two independent writings of one formula, ties included."""
    import fastrank

    generator = torch.Generator().manual_seed(1)
    logprobs = -torch.rand(5, 4, 3, generator=generator, dtype=torch.float64)
    rewards = torch.randint(3, (5, 4), generator=generator).double()
    scores = logprobs.mean(-1)
    term = ranking_term(scores, rewards, loss).mean()
    ours = fastrank.ranking_loss(scores, rewards, loss=fastrank.loss_from_name(loss))
    assert term.item() == pytest.approx(ours.item(), rel=1e-12)
