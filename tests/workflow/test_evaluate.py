"""Evaluation: rewards, perplexity against plain forward passes, BLEU, wins, ranking accuracy."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import tiny_models
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastrank.data.render import PLAIN
from fastrank.data.rows import Place
from fastrank.errors import InputError
from fastrank.metrics import pairwise_accuracy
from fastrank.workflow import generation, policy, policy_metrics
from fastrank.workflow.evaluate import EvaluateOptions, evaluate, evaluation_text
from fastrank.workflow.items import PromptItem
from fastrank.workflow.policy_metrics import (
    Samples,
    bleu,
    compare_rewards,
    mean_reward,
    perplexity,
)

PROMPTS = [{"prompt": "tell " * (k % 3) + str(k), "answer": f"tell {k}"} for k in range(9)]


def run(model, **options):
    drawing = {
        "max_new_tokens": 8,
        "batch_size": 4,
        "num_responses": options.pop("num_responses", 2),
    }
    options = {key: str(value) for key, value in options.items()}
    return evaluate(EvaluateOptions(model=str(model), **options, **drawing))


@pytest.fixture
def vowels(tmp_path: Path) -> str:
    path = tmp_path / "vowels.py"
    path.write_text(
        "def count(prompt, response):\n    return sum(c in 'aeiou' for c in response)\n"
    )
    return f"{path}:count"


def item(prompt: str, *responses: str, ended: list[bool] | None = None) -> PromptItem:
    unknown = [None] * len(responses)
    ended = [True] * len(responses) if ended is None else ended
    return PromptItem(
        Place("p", 1), prompt, list(responses), unknown, ["m"] * len(responses), ended
    )


def test_fresh_samples_and_their_rewards(policy_path, write_rows, read_rows, tmp_path, vowels):
    output = tmp_path / "samples.jsonl"
    result = run(policy_path, prompts=write_rows(PROMPTS), reward=vowels, output=output)
    rows = read_rows(output)
    rewards = [[sum(c in "aeiou" for c in r) for r in row["responses"]] for row in rows]
    assert [row["scores"] for row in rows] == rewards
    means = [sum(row) / 2 for row in rewards]
    assert result["reward"]["mean"] == pytest.approx(sum(means) / 9)
    spread = math.sqrt(sum((m - sum(means) / 9) ** 2 for m in means) / 8 / 9)
    assert result["reward"]["standard_error"] == pytest.approx(spread)
    assert result["responses"] == 18 and result["reward"]["num_prompts"] == 9
    assert (
        run(policy_path, prompts=write_rows(PROMPTS), reward=vowels)["reward"] == result["reward"]
    )


def test_a_model_ties_with_itself_and_wins_mirror_losses(
    policy_path, other_policy_path, write_rows, vowels
):
    prompts = write_rows(PROMPTS)
    options = {"prompts": prompts, "reward": vowels, "num_responses": 1}
    same = run(policy_path, against=policy_path, **options)["against"]
    assert (same["win"], same["tie"], same["lose"]) == (0, 9, 0)
    there = run(policy_path, against=other_policy_path, **options)["against"]
    back = run(other_policy_path, against=policy_path, **options)["against"]
    assert (there["win"], there["tie"], there["lose"]) == (
        back["lose"],
        back["tie"],
        back["win"],
    )
    assert there["win"] + there["tie"] + there["lose"] == 9


def test_perplexity_equals_separate_forward_passes(policy_path):
    model = AutoModelForCausalLM.from_pretrained(policy_path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(policy_path)
    samples = Samples(
        [item("ab", "cde", "", "f", ended=[False, True, True]), item("x", "yz", ended=[False])], 0
    )
    total, tokens = 0.0, 0
    for prompt, response, ended in (
        ("ab", "cde", 0),
        ("ab", "", 1),
        ("ab", "f", 1),
        ("x", "yz", 0),
    ):
        start = tokenizer.encode(prompt)
        answer = tokenizer.encode(response) + [tokenizer.eos_token_id] * ended
        ids = torch.tensor([start + answer])
        with torch.no_grad():
            logp = model(ids).logits[0].log_softmax(-1)
        total += sum(float(logp[len(start) - 1 + i, t]) for i, t in enumerate(answer))
        tokens += len(answer)
    expected = math.exp(-total / tokens)
    assert perplexity(model, tokenizer, samples) == pytest.approx(expected, rel=1e-4)


def test_perplexity_under_a_model_and_under_the_policy_itself(
    policy_path, other_policy_path, write_rows
):
    prompts = write_rows(PROMPTS)
    own = run(policy_path, prompts=prompts, perplexity_model=policy_path)
    other = run(policy_path, prompts=prompts, perplexity_model=other_policy_path)
    assert 1 < own["perplexity"] < other["perplexity"]


def test_an_empty_generation_is_rewarded_and_has_a_perplexity(write_rows, tmp_path):
    silent = tiny_models.save_silent_model(tmp_path / "silent")
    path = tmp_path / "length.py"
    path.write_text("def reward(prompt, response):\n    return len(response) - 1\n")
    result = run(
        silent, prompts=write_rows(PROMPTS), reward=f"{path}:reward", perplexity_model=silent
    )
    assert result["reward"]["mean"] == -1.0 and result["empty_responses"] == 18
    assert result["perplexity"] == pytest.approx(1.0)


def test_ranking_accuracy_is_that_of_the_models_scores(policy_path, write_rows):
    from fastrank.data.load import load_groups
    from fastrank.modeling.score import score

    rows = [
        {"prompt": f"q{k}", "responses": ["a" * (j + 1) for j in range(4)], "scores": [3, 1, 2, k]}
        for k in range(5)
    ]
    data = write_rows(rows)
    result = run(policy_path, data=data)
    groups, _ = load_groups(data, AutoTokenizer.from_pretrained(policy_path))
    model = AutoModelForCausalLM.from_pretrained(policy_path, dtype=torch.float32)
    expected = pairwise_accuracy(score(model, groups), [group.rewards for group in groups])
    assert result["ranking"]["pairwise_accuracy"] == pytest.approx(expected)
    assert set(result["ranking"]) >= {"kendall_tau", "ndcg", "mrr", "top1_accuracy"}
    assert "reward" not in result and "kendall_tau" in evaluation_text(result)


def test_wins_ties_and_missing_rewards():
    assert compare_rewards([[1.0, None], [], [0.5]], [[0.0], [1.0], [0.5]]) == {
        "win": 1,
        "tie": 1,
        "lose": 0,
    }
    assert math.isnan(mean_reward([[], [None]]).mean)
    single = mean_reward([[2.0, 4.0]])
    assert single.mean == 3.0 and math.isnan(single.standard_error)


def test_bleu_is_sacrebleus(policy_path, write_rows):
    sacrebleu = pytest.importorskip("sacrebleu", reason="the extra eval")
    texts = ["the cat sat on the mat today", "a dog ran over the old bridge"]
    samples = Samples([item("a", texts[0], "no"), item("b", texts[1]), item("c", "x")], 0)
    references = [[texts[0]], ["a dog walked over the old bridge", texts[1] + " fast"], []]
    expected = sacrebleu.corpus_bleu(
        [texts[0], "no", texts[1]],
        [[texts[0], texts[0], references[1][0]], [None, None, references[1][1]]],
    ).score
    assert bleu(samples, references) == pytest.approx(expected)
    assert 20 < expected < 100
    result = run(policy_path, prompts=write_rows(PROMPTS), reference_key="answer")
    assert 0 <= result["bleu"] <= 100
    with pytest.raises(InputError, match="no record of the prompts has a reference"):
        run(policy_path, prompts=write_rows(PROMPTS), reference_key="absent")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "expected --prompts .* or --data"),
        ({"data": "x", "reward": "y"}, "--reward needs --prompts"),
        ({"prompts": "x", "against": "y"}, "--against needs --reward"),
    ],
)
def test_options_that_do_not_go_together(options, said):
    with pytest.raises(InputError, match=said):
        EvaluateOptions(model="m", **options)


HH = "\n\nHuman: {}\n\nAssistant:"
PAIRS = [
    {"good": HH.format(k) + f" yes {k}", "bad": HH.format(k) + " no", "context": "C"}
    for k in range(4)
]
CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %}"


def test_the_files_of_training_are_evaluated_on(policy_path, write_rows, monkeypatch):
    pytest.importorskip("sacrebleu", reason="the extra fastrank[eval]")
    seen = []
    monkeypatch.setattr(policy_metrics, "bleu", lambda samples, own: seen.append(own) or 1.0)
    file = write_rows(PAIRS)
    more = {"columns": "chosen=good,rejected=bad,context=", "reference_key": "chosen"}
    result = run(policy_path, prompts=file, data=file, **more)
    assert seen == [[[f"yes {k}"] for k in range(4)]] and result["prompts"] == 4
    assert result["ranking"]["report"]["records"]["kept"] == 4
    with pytest.raises(InputError, match="fields of no known format"):
        run(policy_path, prompts=file, reference_key="chosen")
    several = [{"prompt": "q", "chosen": ["x", "y"], "rejected": "z"}]
    run(policy_path, prompts=write_rows(several), reference_key="chosen", format="preference")
    assert seen[1:] == [[["x", "y"]]]


def test_a_chat_template_is_that_of_the_policies(policy_path, write_rows, tmp_path, monkeypatch):
    template = tmp_path / "chat.jinja"
    template.write_text(CHAT)
    drawn = []

    def remember(model, tokenizer, prompts, decoding, seed):
        drawn.extend(tokenizer.decode(ids) for ids in prompts)
        return generation.generate(model, tokenizer, prompts, decoding, seed)

    monkeypatch.setattr(policy, "generate", remember)
    prompts = write_rows([{"prompt": "hi"}, {"prompt": [{"role": "user", "content": "hi"}]}])
    more = {"chat_template": template, "as_chat": True, "reward": policy_path}
    result = run(policy_path, prompts=prompts, **more)
    assert [text.removeprefix("<s>") for text in drawn] == ["user: hi;"] * 2
    # The reward model has no template, which is said.
    assert result["reward"]["read_as"][PLAIN] == 2
    assert f"2 records read as: {PLAIN}" in evaluation_text(result)
