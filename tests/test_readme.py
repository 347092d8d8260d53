"""The README's snippets run as they stand, and give what the plain computation gives."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from pack_cases import separate_scores
from padded_batch import padded_batch

import fastrank

README = Path(__file__).resolve().parents[1] / "README.md"
SNIPPETS = dict(
    re.findall(r"<!-- snippet: (.+?) -->\n```python\n(.*?)```", README.read_text(), re.S)
)


@pytest.fixture
def batch() -> dict:
    return padded_batch()


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
