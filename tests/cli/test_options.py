"""Options: each declared once in the package; a command changes what it inherits, and says how."""

from __future__ import annotations

import ast
import dataclasses
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastrank.cli.commands import COMMANDS
from fastrank.options.declare import Options, change, option, options, values_of

ROOT = Path(__file__).resolve().parents[2]


def declared(function: str) -> Iterator[tuple[str, str]]:
    """(class, option) of every field that is made by a call of ``function`` in the package."""
    for path in sorted((ROOT / "fastrank").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for field in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(field, ast.AnnAssign) and isinstance(field.value, ast.Call):
                    called = ast.unparse(field.value.func)
                    if called == function or called.endswith(f".{function}"):
                        assert isinstance(field.target, ast.Name)
                        yield node.name, field.target.id


def test_every_option_is_declared_once() -> None:
    counts = Counter(name for _, name in declared("option"))
    assert len(counts) > 90
    assert [name for name, count in counts.items() if count > 1] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_have_no_other_options(name: str) -> None:
    """Those of transformers aside, everything that a command takes comes from `option`."""
    from transformers import TrainingArguments

    known = {name for _, name in declared("option")}
    known |= {field.name for field in dataclasses.fields(TrainingArguments)}
    seen: list[str] = []
    for kind in COMMANDS[name]().options:
        assert issubclass(kind, Options)
        for field in dataclasses.fields(kind):
            assert field.name in known and field.metadata["help"], field.name
            seen.append(field.name)
    assert len(seen) == len(set(seen)), "two of the command's classes have an option in common"


def test_a_change_says_only_what_differs() -> None:
    made = {kind.__name__: kind for name in COMMANDS for kind in COMMANDS[name]().options}
    changed = [(cls, name) for cls, name in declared("change") if cls in made]
    assert len(changed) > 30
    for cls, name in changed:
        kind = made[cls]
        (own,) = (field for field in dataclasses.fields(kind) if field.name == name)
        before = next(
            field
            for base in kind.__mro__[1:]
            if name in base.__dict__.get("__annotations__", {}) and dataclasses.is_dataclass(base)
            for field in dataclasses.fields(base)
            if field.name == name
        )
        default = (own.default, own.type) != (before.default, before.type)
        assert default or own.metadata["help"] != before.metadata["help"], f"{cls}.{name}"


@options
class Named(Options):
    """Names."""

    name: str | None = option("a name", default=None)
    tags: list[str] = option("some", default_factory=list)


@options
class Other(Options):
    count: int = option("how many", default=1)


@options
class Both(Named, Other):
    own: bool = option("a flag", default=False)
    name: str = change(required=True)
    tags: list[str] = change("several")
    count: int = change(default=3)


def test_changes_of_inherited_options() -> None:
    with pytest.raises(TypeError, match="name"):
        Both()  # type: ignore[call-arg]
    made = Both(name="x")
    assert (made.tags, made.count, made.own) == ([], 3, False)
    assert [field.name for field in dataclasses.fields(Both)] == ["name", "tags", "count", "own"]
    helps = {field.name: field.metadata["help"] for field in dataclasses.fields(Both)}
    assert helps == {"name": "a name", "tags": "several", "count": "how many", "own": "a flag"}
    assert Named().name is None and Other().count == 1
    assert values_of(made, Named) == {"name": "x", "tags": []}
    with pytest.raises(TypeError, match="Lost: no base class declares the option nmae"):

        @options
        class Lost(Named):
            nmae: str = change(required=True)
