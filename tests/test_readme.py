"""The README's snippets run as they stand, and give what the plain computation gives."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fastrank

README = Path(__file__).resolve().parents[1] / "README.md"
SNIPPETS = dict(
    re.findall(r"<!-- snippet: (.+?) -->\n```python\n(.*?)```", README.read_text(), re.S)
)


@pytest.fixture
def batch() -> dict:
    """Two prompts with two and three candidates, padded, as a training script has them."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    groups = []
    for size, prompt in ((2, 5), (3, 7)):
        prompt_ids = torch.randint(1, 64, (prompt,))
        responses = [torch.randint(1, 64, (3 + i,)) for i in range(size)]
        groups.append((prompt_ids, responses, torch.rand(size)))
    paths = [torch.cat([p, r]) for p, rs, _ in groups for r in rs]
    input_ids = torch.nn.utils.rnn.pad_sequence(paths, batch_first=True)
    labels = torch.full_like(input_ids, -100)
    row = 0
    for prompt_ids, responses, _ in groups:
        for response in responses:
            labels[row, len(prompt_ids) : len(prompt_ids) + len(response)] = response
            row += 1
    return {
        "model": model, "torch": torch, "fastrank": fastrank, "batch": groups,
        "input_ids": input_ids, "labels": labels,
        "mask": torch.nn.utils.rnn.pad_sequence([torch.ones_like(p) for p in paths], True),
        "rewards": torch.cat([g[2] for g in groups]),
        "cu_groups": torch.tensor([0, 2, 5], dtype=torch.int32),
    }  # fmt: skip


def plain_scores(batch: dict) -> torch.Tensor:
    logits = batch["model"](batch["input_ids"], attention_mask=batch["mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    keep = labels != -100
    logps = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    return (logps * keep).sum(1) / keep.sum(1)


def test_the_loss_backend(batch) -> None:
    exec(SNIPPETS["loss backend"], batch)
    scores = plain_scores(batch)
    torch.testing.assert_close(batch["out"].scores, scores.detach(), rtol=1e-5, atol=1e-5)
    want = 0.0
    for first, last in ((0, 2), (2, 5)):
        s, r = scores[first:last], batch["rewards"][first:last]
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
    scores = plain_scores(batch)
    torch.testing.assert_close(batch["scores"], scores, rtol=1e-5, atol=1e-5)
    want = torch.nn.functional.softplus(scores[1] - scores[0]) + scores.var()
    (expected,) = torch.autograd.grad(want, model.lm_head.weight)
    torch.testing.assert_close(model.lm_head.weight.grad, expected, rtol=1e-4, atol=1e-6)


def test_every_snippet_is_tested() -> None:
    assert set(SNIPPETS) == {"loss backend", "packs", "own loss"}
