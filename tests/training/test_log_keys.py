"""The table of log keys: what runs log is in it, under these names everywhere."""

from __future__ import annotations

import doctest
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastrank.errors import InputError
from fastrank.modeling import token_statistics
from fastrank.modeling.token_statistics import TokenStatistics
from fastrank.training import log_keys
from fastrank.training.log_keys import BY_NAME, LOG_KEYS, as_markdown, canonical_name
from fastrank.training.run_report import summary_table

OF_TRAINER = {"epoch", "step"}
TIMES = ("runtime", "per_second", "compilation_time", "flos", "train_loss")


def test_the_page_of_the_documentation_is_made_from_the_table() -> None:
    page = Path(__file__).parents[2] / "docs" / "log-keys.md"
    assert page.read_text(encoding="utf-8") == as_markdown(), (
        "write it anew: python -m fastrank.training.log_keys > docs/log-keys.md"
    )
    names = [key.name for key in LOG_KEYS]
    aliases = [alias for key in LOG_KEYS for alias in key.aliases]
    assert len({*names, *aliases}) == len(names) + len(aliases)
    assert all(key.form.format(0.5) for key in LOG_KEYS)
    result = doctest.testmod(log_keys)
    assert result.attempted and not result.failed


@pytest.mark.parametrize("backprop", ["joint", "two_phase"])
def test_a_run_logs_known_keys(make_trainer: Any, menu_groups: Any, backprop: str) -> None:
    """One word for one thing, from the step to the best model; the count of tokens is of the
    whole run, and entropy and accuracy are those of the logits."""
    held_out = menu_groups[8:11]
    trainer = make_trainer(
        menu_groups[:8], held_out, backprop=backprop, eval_strategy="steps", eval_steps=2,
        eval_token_statistics=True, metric_for_best_model="accuracy",
    )  # fmt: skip
    assert trainer.args.metric_for_best_model == "rewards/accuracies"
    trainer.train()
    rows = trainer.state.log_history
    for name in {name for row in rows for name in row}:
        bare = name.removeprefix("eval_")
        assert bare in BY_NAME or name in OF_TRAINER or bare.endswith(TIMES), name
    steps = [row for row in rows if "loss" in row]
    first = steps[0]["num_tokens"]  # every step is an epoch
    assert first > 0 and [row["num_tokens"] for row in steps] == [first * k for k in (1, 2, 3, 4)]
    assert steps[0]["logps/chosen"] == steps[0]["rewards/chosen"]
    last = [row for row in rows if "eval_entropy" in row][-1]
    entropies, hits = [], []
    for group in held_out:
        for response in group.response_ids:
            ids = torch.cat((group.prompt_ids, response))[None]
            with torch.no_grad():
                logits = trainer.lm(input_ids=ids).logits[0].double()
            logp = logits.log_softmax(-1)[len(group.prompt_ids) - 1 : -1]
            entropies += (-(logp.exp() * logp).sum(-1)).tolist()
            hits += (logp.argmax(-1) == response).tolist()
    assert last["eval_entropy"] == pytest.approx(sum(entropies) / len(entropies), rel=1e-5)
    assert last["eval_mean_token_accuracy"] == pytest.approx(sum(hits) / len(hits))
    table = summary_table({"held out": (None, {k[5:]: v for k, v in last.items()})})
    assert "rewards/accuracies" in table and "mean_token_accuracy" in table


def test_tokens_are_counted_over_a_resumption(make_trainer: Any, menu_groups: Any) -> None:
    options = {"logging_steps": 3, "save_steps": 2, "save_strategy": "steps", "max_steps": 6}
    counts = []
    for checkpoint in (None, "checkpoint-4"):
        trainer = make_trainer(menu_groups[:12], **options)
        folder = Path(trainer.args.output_dir)
        trainer.train(None if checkpoint is None else str(folder / checkpoint))
        history = trainer.state.log_history
        counts.append([row["num_tokens"] for row in history if "num_tokens" in row])
    assert counts[0] == counts[1] and len(counts[0]) == 2


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_statistics_of_rows(softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many blocks of rows that repeat, a bias, a scale and a cap; a pack that only fills a turn is
    left out, and so is a token whose distribution has zeros in it."""
    monkeypatch.setattr(token_statistics, "_BLOCK_BYTES", 3 * 4 * 11)
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(n, 5, generator=generator) * 9 for n in (6, 11))
    bias = torch.randn(11, generator=generator)
    rows = torch.tensor([0, 0, 3, 5, 1, 2, 4, 4])
    labels = torch.randint(11, (8,), generator=generator)
    z = 0.5 * (hidden.double()[rows] @ weight.double().T + bias.double())
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    logp = z.log_softmax(-1)
    pack: Any = SimpleNamespace(rows=rows, labels=labels)
    found = TokenStatistics()
    for _ in range(2):
        found.add(hidden, weight, bias, pack, softcap=softcap, logit_scale=0.5, divided=False)
    entropy, hits, tokens = found.sums(8)
    assert entropy == pytest.approx(float(-(logp.exp() * logp).nansum()), rel=1e-5)
    assert (hits, tokens) == (int((z.argmax(-1) == labels).sum()), 8)
    with pytest.raises(InputError, match="divided over processes"):
        found.add(hidden, weight, bias, pack, softcap=softcap, logit_scale=0.5, divided=True)
    with pytest.raises(InputError, match="head_path=fused, got logits"):
        TokenStatistics().sums(8)


def test_names() -> None:
    assert canonical_name("eval_tau") == "eval_rank/kendall_tau"
    assert canonical_name("lr") == "learning_rate" and canonical_name("own") == "own"
