"""The pages of docs/: their code runs as printed, and the site builds without a warning."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from padded_batch import padded_batch

import fastrank
from fastrank.cli.commands import COMMANDS
from fastrank.data.formats import FORMATS

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.S | re.M)


def blocks(page: Path, language: str) -> list[str]:
    return [body for name, body in BLOCK.findall(page.read_text()) if name == language]


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.stem)
def test_python_runs_as_printed(page: Path) -> None:
    """All blocks of a page in order, in one namespace that has what a training script has."""
    names = padded_batch()
    for code in blocks(page, "python"):
        exec(compile(code, str(page), "exec"), names)


def test_the_repository_s_yaml_is_yaml() -> None:
    files = [ROOT / "CITATION.cff", ROOT / "mkdocs.yml", *sorted((ROOT / ".github").rglob("*.yml"))]
    for path in files:
        assert isinstance(yaml.safe_load(path.read_text()), dict), path


def test_the_site_leads_to_every_page() -> None:
    menu = json.dumps(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(re.findall(r'"([\w-]+\.md)"', menu)) == [page.name for page in PAGES]


def test_json_is_json() -> None:
    for page in (README, *PAGES):
        for text in blocks(page, "json"):
            for line in text.splitlines():
                assert isinstance(json.loads(line), dict), (page.name, line)


def test_commands_and_options_exist() -> None:
    """Every ``fastrank COMMAND --option`` of a page is one that the parser knows."""
    known = {
        name: {
            spelled.removeprefix("--")
            for kind in made().options
            for field in dataclasses.fields(kind)
            for spelled in (field.name, *field.metadata.get("aliases", ()))
        }
        for name, made in COMMANDS.items()
    }
    found = 0
    for page in (README, *PAGES):
        for text in blocks(page, ""):
            for command, rest in re.findall(r"\bfastrank (\w+)(.*)", text.replace("\\\n", " ")):
                for option in re.findall(r"--([a-z0-9_]+)", rest):
                    assert option in {*known[command], "config"}, (
                        f"{page.name}: fastrank {command} --{option}"
                    )
                    found += 1
    assert found > 30


def test_the_messages_of_troubleshooting_are_the_library_s() -> None:
    """Each quoted message is a text of the source, its values replaced by an ellipsis."""
    said = set()
    for path in sorted((ROOT / "fastrank").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (getattr(part, "value", None) for part in node.values)
                said.add("".join(part if isinstance(part, str) else "…" for part in parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                said.add(node.value)
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| `([^`]+)` \|", page, re.M)
    assert len(messages) > 25
    for message in messages:
        pattern = ".*".join(map(re.escape, message.split("…")))
        assert any(re.search(pattern, text) for text in said), message


def test_every_public_name_is_on_the_page_of_the_api() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^::: fastrank\.(\w+)$", page, re.M))
    # The page has all of these modules.
    rest = set(fastrank.__all__) - listed - {"__version__", "Loss"}
    assert all(hasattr(fastrank.losses, name) for name in rest), rest


def test_the_page_of_formats_lists_all_with_their_fields() -> None:
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", page, re.M))
    assert rows.keys() == {*FORMATS}
    for name, cell in rows.items():
        assert set(FORMATS[name].fields) <= set(re.findall(r"`(\w+)`", cell)), name


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    page = (tmp_path / "index.html").read_text()
    outside = re.findall(r'(?:src|href)="(https?://[^"]+\.(?:js|css|woff2?))"', page)
    assert not outside, outside
