"""The built-in task: what makes it a ranking task, and that it can be saved and loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastrank.data.report import Report
from fastrank.data.tokenize import TokenizeOptions, tokenize_record
from fastrank.tasks.menu import DISHES, menu_records, menu_task, word_tokenizer


def _liked(prompt: str) -> set[str]:
    return set(prompt.removeprefix("guest likes ").split(" ;")[0].split())


def test_scores_are_the_share_of_liked_dishes() -> None:
    records = menu_records(300, seed=5)
    for record in records:
        liked = _liked(record.prompt)  # type: ignore[arg-type]
        assert len(liked) == 3 and liked <= set(DISHES)
        assert 4 <= len(record.responses) <= 6
        assert len(set(record.scores)) > 1
        for response, score in zip(record.responses, record.scores, strict=True):
            dishes = response.split()
            assert score == sum(dish in liked for dish in dishes) / len(dishes)


def test_guests_held_out_have_tastes_of_their_own() -> None:
    task = menu_task(seed=3)
    train = {frozenset(_liked(r.prompt)) for r in task.train}  # type: ignore[arg-type]
    heldout = {frozenset(_liked(r.prompt)) for r in task.heldout}  # type: ignore[arg-type]
    assert len(train) == len(task.train) and len(heldout) == len(task.heldout)
    assert not train & heldout


def test_the_order_depends_on_the_prompt_and_not_on_the_position() -> None:
    """A dish is good for some guests and bad for others; the best meal stands anywhere."""
    records = menu_records(500, seed=1)
    first_best = sum(record.scores.index(max(record.scores)) == 0 for record in records)
    assert 0.1 < first_best / len(records) < 0.5
    for dish in DISHES:
        with_dish = [
            score
            for record in records
            for response, score in zip(record.responses, record.scores, strict=True)
            if dish in response.split()
        ]
        assert 0.3 < sum(with_dish) / len(with_dish) < 0.7


def test_the_seed_decides_everything() -> None:
    first, again, other = (menu_task(num_train=20, num_heldout=5, seed=s) for s in (1, 1, 2))
    assert first.train == again.train and first.heldout == again.heldout
    assert first.train != other.train
    state = torch.get_rng_state()
    for key, value in menu_task(num_train=20, num_heldout=5, seed=1).model.state_dict().items():
        assert torch.equal(first.model.state_dict()[key], value)
    assert torch.equal(torch.get_rng_state(), state)


def test_more_guests_than_tastes_are_refused() -> None:
    with pytest.raises(ValueError, match="count must be at most 2024 .* got 2025"):
        menu_records(2025)


def test_records_become_groups_word_by_word() -> None:
    tokenizer, report = word_tokenizer(), Report(name="menu")
    record = menu_records(1, seed=2)[0]
    group = tokenize_record(record, tokenizer, TokenizeOptions(), report)
    assert group is not None
    assert tokenizer.decode(group.prompt_ids) == str(record.prompt).strip()
    for ids, response in zip(group.response_ids, record.responses, strict=True):
        assert tokenizer.decode(ids) == f"{response} <eos>"
    assert group.rewards.tolist() == pytest.approx(record.scores)


def test_model_and_tokenizer_load_again(tmp_path: Path) -> None:
    task = menu_task(num_train=2, num_heldout=1)
    task.tokenizer.save_pretrained(tmp_path)
    task.model.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = tokenizer("guest likes fig plum soup ; meal :", return_tensors="pt")
    assert tokenizer.unk_token_id not in ids["input_ids"]
    assert ids["input_ids"].max() < model.config.vocab_size == len(tokenizer)
    out = model.generate(**ids, max_new_tokens=4, do_sample=False)
    assert out.shape[1] > ids["input_ids"].shape[1]
