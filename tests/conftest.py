"""Fixtures that every test folder shares."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_collection_finish() -> None:
    """Leave what the imports made to no later collection: walking over it takes a second each."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test draws the same numbers, whatever ran before it in its process: which tests those
    are depends on how busy the machine is."""
    torch.manual_seed(20240229)


def _shared_or_skip(relative: str) -> Path:
    path = SHARED / relative
    if not path.exists():
        pytest.skip(f"{relative} is not beside this checkout")
    return path


@pytest.fixture(scope="session")
def oasst_path() -> Path:
    """212 prompts with ranked replies (JSON lines), from OpenAssistant."""
    return _shared_or_skip("data/oasst_en_ranked.jsonl")


@pytest.fixture(scope="session")
def story_model_path() -> Path:
    """A real pre-trained Llama of 260 K parameters."""
    return _shared_or_skip("models/tinystories-260k")


@pytest.fixture(scope="session")
def policy_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of a few thousand weights with its tokenizer; not to be written to."""
    import tiny_models

    return tiny_models.save_llama(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="session")
def other_policy_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like `policy_path`, with other weights."""
    import tiny_models

    return tiny_models.save_llama(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """Write rows as JSON lines and return the file's path."""

    def write(rows: Sequence[dict[str, Any]], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture
def read_rows() -> Callable[[Path], list[dict[str, Any]]]:
    """Read a file of JSON lines."""

    def read(path: Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    return read


@pytest.fixture
def run_json(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Run a command that must succeed with ``--json``; returns its result, the last line."""

    def run(*arguments: object) -> dict[str, Any]:
        from fastrank.cli.main import main

        assert main([*map(str, arguments), "--json"]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run
