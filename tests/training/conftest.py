"""The built-in task in small, as groups and as an untrained model."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from pack_cases import tied_groups

from fastrank.data.group import Group
from fastrank.data.report import Report
from fastrank.data.tokenize import TokenizeOptions, tokenize_record
from fastrank.tasks.menu import menu_records, tiny_llama, word_tokenizer
from fastrank.training.config import RankConfig
from fastrank.training.trainer import RankTrainer


@pytest.fixture(scope="session", autouse=True)
def collect_quickly() -> None:
    """Every run begins with a garbage collection, which would walk over all imported modules."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def menu_groups() -> list[Group]:
    """48 guests of the built-in task; the ragged part comes from 4 to 6 candidates each."""
    tokenizer, report = word_tokenizer(), Report(name="menu")
    found = [
        tokenize_record(record, tokenizer, TokenizeOptions(), report)
        for record in menu_records(48, seed=1)
    ]
    return [group for group in found if group is not None]


@pytest.fixture(scope="session")
def ragged_groups() -> list[Group]:
    """23 groups of random tokens: 1 to 5 candidates of 1 to 9 tokens, with ties."""
    return tied_groups(3, 5, name="ragged")


@pytest.fixture
def make_trainer(tmp_path: Any) -> Callable[..., RankTrainer]:
    """A trainer of a fresh tiny Llama; keyword arguments are options of the run."""

    def make(groups: list[Group], eval_groups: list[Group] | None = None, **options: Any) -> Any:
        names = ("callbacks", "peft_config", "ref_model")
        given = {name: options.pop(name) for name in names if name in options}
        model = options.pop("model", None) or tiny_llama(0)
        defaults: dict[str, Any] = {
            "output_dir": str(tmp_path / "run"),
            "learning_rate": 1e-3,
            "per_device_train_batch_size": 8,
            "max_steps": 4,
            "logging_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
        }
        config = RankConfig(**(defaults | options))
        return RankTrainer(model, config, groups, eval_groups, **given)

    return make
