"""Private names of transformers and accelerate are used in `fastrank.hf_private` alone."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from pathlib import Path

import accelerate
import pytest
import transformers
from torch import nn

import fastrank.hf_private

PACKAGE = Path(fastrank.hf_private.__file__).parent
ALLOWED = Path(fastrank.hf_private.__file__)
OWNERS = (
    transformers.Trainer,
    transformers.TrainingArguments,
    transformers.PreTrainedModel,
    transformers.PretrainedConfig,
    accelerate.Accelerator,
    accelerate.state.GradientState,
)


def private_names() -> set[str]:
    """Methods and attributes of the classes above, but for those that torch's modules have."""
    names = {name for owner in OWNERS for name in dir(owner)}
    for owner in OWNERS:
        names |= set(re.findall(r"self\.(_\w+)", inspect.getsource(sys.modules[owner.__module__])))
    return {name for name in names if is_private(name)} - set(dir(nn.Module()))


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def uses(source: str, names: set[str]) -> list[str]:
    """Private names that a file calls, reads, overrides, imports or asks for by ``getattr``."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            used = [node.attr]
        elif isinstance(node, ast.ClassDef):
            used = [n.name for n in node.body if isinstance(n, ast.FunctionDef)]
            assigned = [n for n in node.body if isinstance(n, (ast.Assign, ast.AnnAssign))]
            used += [t.id for n in assigned for t in ast.walk(n) if isinstance(t, ast.Name)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            used = [node.value]
        elif isinstance(node, ast.ImportFrom):
            parts = (node.module or "").split(".")
            if parts[0] in ("transformers", "accelerate"):
                found += filter(is_private, (*parts, *(alias.name for alias in node.names)))
            continue
        else:
            continue
        found += [name for name in used if name in names]
    return found


@pytest.fixture(scope="module")
def names() -> set[str]:
    return private_names()


def test_every_kind_of_use_is_seen(names: set[str]) -> None:
    assert {"_save_checkpoint", "_tr_loss", "_models", "_set_sync_gradients"} <= names
    assert uses("trainer._tr_loss.clone()", names) == ["_tr_loss"]
    assert uses("class T(Trainer):\n    def _save(self): ...", names) == ["_save"]
    assert uses("class A(Args):\n    _VALID_DICT_FIELDS = [1]", names) == ["_VALID_DICT_FIELDS"]
    assert uses("getattr(accelerator, '_models')", names) == ["_models"]
    assert uses("from transformers.utils import _private", names) == ["_private"]
    assert uses("self._own\nfrom fastrank.data import _mine", names) == []
    assert len(uses(ALLOWED.read_text(), names)) > 10


def test_they_are_used_in_one_file(names: set[str]) -> None:
    found = {
        file.relative_to(PACKAGE).as_posix(): used
        for file in sorted(PACKAGE.rglob("*.py"))
        if file != ALLOWED and (used := uses(file.read_text(encoding="utf-8"), names))
    }
    assert not found
