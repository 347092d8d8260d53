"""Drawing responses: batches, seeds, texts, and diverse beam search against a plain one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from fastrank.errors import InputError
from fastrank.options import Decoding
from fastrank.workflow.generation import Response, batch_seed, continuation, generate

PROMPTS = [[1, 40, 50, 60], [1, 70], [1, 33, 34, 35, 36, 37, 38]]


@pytest.fixture(scope="module")
def policy(policy_path: Path):
    model = AutoModelForCausalLM.from_pretrained(policy_path, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(policy_path)


def texts(found) -> list[list[str]]:
    return [[response.text for response in row] for row in found]


@pytest.fixture
def draw(policy) -> Callable[..., list[list[Response]]]:
    """Draw responses to ``PROMPTS``; keyword arguments are those of `Decoding`."""

    def run(num_responses: int, max_new_tokens: int, seed: int = 0, **options: Any) -> Any:
        options |= {"num_responses": num_responses, "max_new_tokens": max_new_tokens}
        return generate(*policy, PROMPTS, Decoding(**options), seed)

    return run


def greedy_tokens(model, prompt: list[int], steps: int, penalties: list[Counter[int]]) -> list[int]:
    """Greedy search by separate forward passes; ``penalties`` lower log-probabilities a step."""
    ids = list(prompt)
    for step in range(steps):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1]
        for token, count in penalties[step].items() if step < len(penalties) else ():
            logits[token] -= count
        ids.append(int(logits.argmax()))
        if ids[-1] == 2:
            break
    return ids[len(prompt) :]


def test_padding_does_not_change_greedy_responses(policy, draw) -> None:
    model, tokenizer = policy
    for prompt, row in zip(PROMPTS, draw(1, 12, top_p=1e-6), strict=True):
        expected = greedy_tokens(model, prompt, 12, [])
        kept = expected[:-1] if expected[-1] == 2 else expected
        assert row[0].text == continuation(tokenizer, prompt, kept)
        assert row[0].num_tokens == len(expected)
        assert row[0].ended == (expected[-1] == 2)


def test_a_seed_draws_the_same_and_leaves_the_callers_random_state(draw) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = texts(draw(4, 8, seed=3))
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(6)
    assert texts(draw(4, 8, seed=3)) == first
    assert texts(draw(4, 8, seed=4)) != first
    assert any(len(set(row)) > 1 for row in first)


def test_a_models_own_generation_defaults_are_neither_used_nor_lost(policy, draw) -> None:
    model, _ = policy
    expected = texts(draw(3, 8, seed=1))
    own = model.generation_config
    altered = GenerationConfig(
        eos_token_id=2, pad_token_id=0, top_k=1, repetition_penalty=9.0, num_beams=2
    )
    model.generation_config = altered
    try:
        assert texts(draw(3, 8, seed=1)) == expected
        assert model.generation_config is altered
    finally:
        model.generation_config = own


def test_low_temperature_is_greedy_and_top_p_narrows(draw) -> None:
    for row in texts(draw(5, 6, temperature=1e-4)):
        assert len(set(row)) == 1
    wide, narrow = (
        sum(len(set(row)) for row in texts(draw(30, 1, top_p=top_p))) for top_p in (1.0, 0.3)
    )
    assert narrow < wide


def test_beam_search_gives_the_ends_of_one_search(policy, draw) -> None:
    model, tokenizer = policy
    sequences = model.generate(
        torch.tensor(PROMPTS[:1]), num_beams=4, num_return_sequences=4, max_new_tokens=9
    )
    expected = [continuation(tokenizer, PROMPTS[0], row[4:].tolist()) for row in sequences]
    assert texts(draw(4, 9, strategy="beam"))[0] == expected
    assert len(set(expected)) > 1


@pytest.mark.parametrize("penalty", [0.5, 3.0])
def test_diverse_beams_of_one_equal_penalised_greedy_searches(policy, draw, penalty: float) -> None:
    model, tokenizer = policy
    steps, groups = 7, 4
    found = draw(groups, steps, strategy="diverse_beam", diversity_penalty=penalty)
    for prompt, row in zip(PROMPTS, found, strict=True):
        penalties: list[Counter[int]] = [Counter() for _ in range(steps)]
        for response in row:
            expected = greedy_tokens(model, prompt, steps, penalties)
            kept = expected[:-1] if expected[-1] == 2 else expected
            assert response.text == continuation(tokenizer, prompt, kept)
            for step, token in enumerate(expected):
                penalties[step][token] += penalty
    assert any(len({r.text for r in row}) == groups for row in found)


def test_one_group_is_plain_beam_search_and_no_penalty_repeats_it(draw) -> None:
    beam = draw(3, 6, strategy="beam")
    assert draw(3, 6, strategy="diverse_beam", num_beam_groups=1) == beam
    two: dict[str, Any] = {"strategy": "diverse_beam", "num_beam_groups": 2}
    assert draw(6, 6, **two, diversity_penalty=0.0) == [row + row for row in beam]
    for row in texts(draw(6, 6, **two, diversity_penalty=5.0)):
        assert set(row[:3]) != set(row[3:])


def test_a_stop_text_ends_a_response_and_is_cut(draw) -> None:
    mark = next(text[6:8] for text in texts(draw(4, 20))[0] if len(text) > 8)
    found = draw(4, 20, stop=[mark])
    assert all(mark not in response.text for row in found for response in row)
    assert any(r.ended and r.num_tokens < 20 for r in found[0])


def test_a_response_keeps_its_leading_space(story_model_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(story_model_path)
    prompt = tokenizer.encode("One day, a")
    ids = tokenizer.encode("cat", add_special_tokens=False)
    assert continuation(tokenizer, prompt, ids)[0] == " "


def test_an_empty_generation_is_an_empty_text(tmp_path: Path) -> None:
    path = tiny_models.save_silent_model(tmp_path / "silent")
    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    found = generate(model, tokenizer, PROMPTS, Decoding(num_responses=2, max_new_tokens=5), 0)
    assert {r for row in found for r in row} == {("", 1, True)}


def test_seeds_of_batches_differ() -> None:
    assert len({batch_seed(s, b) for s in range(20) for b in range(20)}) == 400


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"strategy": "greedy"}, "strategy must be one of top_p, beam, diverse_beam"),
        ({"num_responses": 0}, "num_responses must be at least 1, got 0"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"strategy": "beam", "temperature": 0.5}, "temperature belongs to strategy top_p"),
        ({"num_beam_groups": 2}, "num_beam_groups belongs to strategy diverse_beam"),
        (
            {"strategy": "diverse_beam", "num_responses": 6, "num_beam_groups": 4},
            "num_beam_groups must divide num_responses=6, got 4",
        ),
    ],
)
def test_wrong_decoding_is_one_line(options: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        Decoding(**options)
