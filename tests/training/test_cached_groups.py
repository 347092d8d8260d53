"""Training on groups out of the mapped cache is training on the list of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from architectures import build
from record_files import byte_tokenizer, some_rows, write_jsonl
from transformers import PreTrainedModel

from fastrank import Group
from fastrank.data.cached_groups import CachedGroups
from fastrank.data.group import Group as GroupClass
from fastrank.data.load import load_groups
from fastrank.errors import InputError
from fastrank.training.memory import fullest
from fastrank.training.splits import choose_groups, shared_prompts, split_by_prompt
from fastrank.training.trainer import RankTrainer


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Group], CachedGroups]:
    folder = tmp_path_factory.mktemp("cached")
    path = write_jsonl(folder / "d.jsonl", some_rows(120))
    listed, _ = load_groups(path, byte_tokenizer(), cache=False)
    mapped, _ = load_groups(path, byte_tokenizer(), cache_dir=folder / "cache")
    assert isinstance(listed, list) and isinstance(mapped, CachedGroups)
    return listed, mapped


def model(vocab_size: int = 258) -> PreTrainedModel:
    return build("llama", vocab_size=vocab_size, num_hidden_layers=1, max_position_embeddings=128)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_same_weights_come_out(
    workers: int,
    both: tuple[list[Group], CachedGroups],
    make_trainer: Callable[..., RankTrainer],
) -> None:
    weights, metrics = [], []
    for groups in both:
        train, heldout = split_by_prompt(groups, 0.2, seed=1)
        assert isinstance(train, type(groups)) and isinstance(heldout, type(groups))
        trainer = make_trainer(
            train, heldout, model=model(), max_tokens=2000, dataloader_num_workers=workers
        )
        trainer.train()
        values = trainer.evaluate()
        metrics.append({k: v for k, v in values.items() if "/" in k or k.endswith("loss")})
        weights.append([p.detach().clone() for p in trainer.model.parameters()])
    assert all(a.equal(b) for a, b in zip(*weights, strict=True))
    assert metrics[0] == metrics[1]


def test_splits_and_samples_are_the_same(both: tuple[list[Group], CachedGroups]) -> None:
    listed, mapped = ([part for part in split_by_prompt(g, 0.3, seed=5)] for g in both)
    for a, b in zip(listed, mapped, strict=True):
        assert [g.name for g in a] == [g.name for g in b]
    assert shared_prompts(*listed) == shared_prompts(*mapped) == 0
    assert shared_prompts(*both) == len(both[0])
    names = [[g.name for g in choose_groups(groups, 7, seed=2)] for groups in both]
    assert names[0] == names[1] and len(names[0]) == 7
    for shared in (True, False):
        chosen = [[g.name for g in fullest(groups, 900, shared)] for groups in both]
        assert chosen[0] == chosen[1] and len(chosen[0]) > 1


def test_checks_name_the_group_without_touching_the_others(
    both: tuple[list[Group], CachedGroups],
    make_trainer: Callable[..., RankTrainer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    listed, mapped = both
    sizes = np.array([g.num_tokens_shared for g in listed])
    small, large = int(sizes.min()), int(np.flatnonzero(sizes > sizes.min())[0])
    made = []
    whole = GroupClass.__post_init__
    monkeypatch.setattr(GroupClass, "__post_init__", lambda self: (made.append(1), whole(self)))
    with pytest.raises(InputError, match=f"{listed[large].name}: must fit into max_tokens={small}"):
        make_trainer(mapped, model=model(), max_tokens=small)
    # 195 and above begin characters of two bytes; the texts have some, but not all.
    largest = [max(int(i.max()) for i in (g.prompt_ids, *g.response_ids)) for g in listed]
    limit = max(largest)
    first = listed[largest.index(limit)].name
    with pytest.raises(InputError, match=f"{first}: token ids must be below the model's {limit}"):
        make_trainer(mapped, model=model(limit))
    make_trainer(mapped, model=model())
    assert len(made) < 10 < len(mapped) / 5  # those in messages, and a few that are made up
