"""Out of memory: what is said, and the search for a size that fits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from faults import limit_memory
from trainer_runs import assert_same_weights

from fastrank.data.group import Group
from fastrank.errors import TrainingStopped
from fastrank.training.checkpoint import read_notes
from fastrank.training.memory import find_pack_size, fullest, is_out_of_memory

Make = Callable[..., Any]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError, RuntimeError])
def test_the_message_names_pack_and_setting(
    make_trainer: Make, menu_groups: list[Group], error: type[Exception]
) -> None:
    trainer = make_trainer(menu_groups, max_tokens=300)
    limit_memory(trainer.model, 150, error)
    with pytest.raises(TrainingStopped) as caught:
        trainer.train()
    text = str(caught.value)
    assert "out of memory in a pack of" in text and "lower --max_tokens (300)" in text
    groups, candidates, tokens = [int(word) for word in text.split() if word.isdigit()][:3]
    assert 1 < groups <= 8 and groups < candidates < tokens <= 300 and tokens > 150
    assert "\n" not in text


def test_one_large_group_is_told_apart(make_trainer: Make, menu_groups: list[Group]) -> None:
    trainer = make_trainer(menu_groups, per_device_train_batch_size=1)
    limit_memory(trainer.model, 5)
    with pytest.raises(TrainingStopped, match=r"holds one group \(menu:\d+\).*max_response_length"):
        trainer.train()


def test_an_evaluation_says_the_same(make_trainer: Make, menu_groups: list[Group]) -> None:
    trainer = make_trainer(menu_groups, menu_groups)
    limit_memory(trainer.model, 150)
    with pytest.raises(TrainingStopped, match="out of memory in a pack of"):
        trainer.evaluate()


def test_other_errors_pass_through(make_trainer: Make, menu_groups: list[Group]) -> None:
    trainer = make_trainer(menu_groups)

    def hook(module: Any, inputs: Any) -> None:
        raise RuntimeError("a defect")

    trainer.model.get_input_embeddings().register_forward_pre_hook(hook)
    with pytest.raises(RuntimeError, match="a defect") as caught:
        trainer.train()
    assert not isinstance(caught.value, TrainingStopped)
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"))
    assert not is_out_of_memory(ValueError("out of memory"))


@pytest.mark.parametrize("capacity", [10, 11, 99, 512, 1000, 4096, 16384, 20000])
def test_the_search_finds_the_largest_that_fits(capacity: int) -> None:
    tried: list[int] = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= capacity

    found = find_pack_size(fits, 10, 16384)
    best = min(capacity, 16384)
    assert found is not None and found <= best
    assert best - found <= max(1, 0.06 * best)
    assert len(tried) <= 20
    assert all(10 <= size <= 16384 for size in tried)


def test_the_search_gives_up_below_the_smallest() -> None:
    assert find_pack_size(lambda size: False, 10, 16384) is None
    assert find_pack_size(lambda size: size <= 10, 10, 10) == 10


@pytest.mark.parametrize("shared_prompts", [True, False])
def test_trial_packs_are_full(menu_groups: list[Group], shared_prompts: bool) -> None:
    chosen = fullest(menu_groups, 400, shared_prompts)
    rows = sum(group.num_candidates for group in chosen)
    size = (
        sum(group.num_tokens_shared for group in chosen)
        if shared_prompts
        else rows * max(group.longest_sequence for group in chosen)
    )
    assert 320 <= size <= 400


def test_a_fitting_size_is_found_and_the_run_is_the_same(
    make_trainer: Make, menu_groups: list[Group], tmp_path: Any
) -> None:
    options = {"optim": "sgd", "learning_rate": 0.05, "max_steps": 3}
    plain = make_trainer(menu_groups, max_tokens=1024, **options)
    plain.train()
    options |= {"max_tokens": 1024, "auto_find_pack_size": True}
    found = make_trainer(menu_groups, save_strategy="steps", save_steps=2, **options)
    limit_memory(found.model, 200)
    found.train()
    assert 180 <= found.max_tokens <= 200 + 30  # in tokens of real packs, which hold whole groups
    assert all(p.grad is None for p in found.model.parameters())
    assert_same_weights(found, plain, atol=2e-6, rtol=1e-5)
    assert read_notes(tmp_path / "run" / "checkpoint-2")["max_tokens"] == found.max_tokens
    resumed = make_trainer(menu_groups, **options)
    resumed.train(resume_from_checkpoint=True)  # without a limit now: the same packs all the same
    assert resumed.max_tokens == found.max_tokens
    assert_same_weights(resumed, found)


def test_no_size_fits(make_trainer: Make, menu_groups: list[Group]) -> None:
    trainer = make_trainer(menu_groups, auto_find_pack_size=True)
    limit_memory(trainer.model, 5)
    with pytest.raises(TrainingStopped, match="holds one group"):
        trainer.train()
