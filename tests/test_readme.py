"""The README's snippets run as they stand, and give what the plain computation gives."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from architectures import build
from pack_cases import random_groups, separate_scores
from torch.nn.utils.rnn import pad_sequence

import fastrank

README = Path(__file__).resolve().parents[1] / "README.md"
SNIPPETS = dict(
    re.findall(r"<!-- snippet: (.+?) -->\n```python\n(.*?)```", README.read_text(), re.S)
)


@pytest.fixture
def batch() -> dict:
    """Two prompts with two and three candidates, padded, as a training script has them."""
    groups = random_groups([(5, [3, 4]), (7, [3, 4, 5])])
    rows = [(group.prompt_ids, ids) for group in groups for ids in group.response_ids]
    sequences = [torch.cat(row) for row in rows]
    labels = [torch.cat((torch.full_like(prompt, -100), ids)) for prompt, ids in rows]
    return {
        "model": build("llama", tie_word_embeddings=False), "torch": torch, "fastrank": fastrank,
        "groups": groups, "batch": [(g.prompt_ids, g.response_ids, g.rewards) for g in groups],
        "input_ids": pad_sequence(sequences, batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
        "mask": pad_sequence([torch.ones_like(ids) for ids in sequences], batch_first=True),
        "rewards": torch.cat([group.rewards for group in groups]),
        "cu_groups": torch.tensor([0, 2, 5], dtype=torch.int32),
    }  # fmt: skip


def test_the_loss_backend(batch) -> None:
    exec(SNIPPETS["loss backend"], batch)
    scores = separate_scores(batch["model"], batch["groups"])
    torch.testing.assert_close(batch["out"].scores, scores.detach(), rtol=1e-5, atol=1e-5)
    want = torch.zeros(())
    for s, r in ((scores[:2], batch["rewards"][:2]), (scores[2:], batch["rewards"][2:])):
        difference = s[:, None] - s[None, :]
        want = want + (difference * (r[:, None] < r[None, :])).clamp(min=0).sum() - s[r.argmax()]
    torch.testing.assert_close(batch["out"].loss, want / 2, rtol=1e-5, atol=1e-5)
    got = batch["model"].lm_head.weight.grad.clone()
    (expected,) = torch.autograd.grad(want / 2, batch["model"].lm_head.weight)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_packs_give_the_gradient_of_the_padded_batch(batch) -> None:
    model = batch["model"]
    hidden = model.model(batch["input_ids"], attention_mask=batch["mask"]).last_hidden_state
    rows, targets, cu_responses = fastrank.flatten(hidden, batch["labels"])
    out = fastrank.linear_ranking_loss(
        hidden.flatten(0, 1), model.lm_head.weight, targets, batch["rewards"], rows=rows,
        cu_responses=cu_responses, cu_groups=batch["cu_groups"], loss=fastrank.PRO(),
    )  # fmt: skip
    want = torch.autograd.grad(out.loss, list(model.parameters()))
    exec(SNIPPETS["packs"], batch)
    for parameter, expected in zip(model.parameters(), want, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6)


def test_a_loss_of_ones_own(batch) -> None:
    model = batch["model"]
    batch["hidden"] = model.model(
        batch["input_ids"], attention_mask=batch["mask"]
    ).last_hidden_state
    batch["rows"], batch["targets"], batch["cu_responses"] = fastrank.flatten(
        batch["hidden"], batch["labels"]
    )
    exec(SNIPPETS["own loss"], batch)
    scores = separate_scores(model, batch["groups"])
    torch.testing.assert_close(batch["scores"], scores, rtol=1e-5, atol=1e-5)
    want = torch.nn.functional.softplus(scores[1] - scores[0]) + scores.var()
    (expected,) = torch.autograd.grad(want, model.lm_head.weight)
    torch.testing.assert_close(model.lm_head.weight.grad, expected, rtol=1e-4, atol=1e-6)


def test_every_snippet_is_tested() -> None:
    assert set(SNIPPETS) == {"loss backend", "packs", "own loss"}
