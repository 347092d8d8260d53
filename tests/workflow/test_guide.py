"""The commands of the documentation run as they stand there, in order, at tiny sizes."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from fastrank.cli.main import main

PAGES = Path(__file__).resolve().parents[2] / "docs"

#: Sizes, behind the guide's own options: the last value of an option counts.
SMALL = {
    "sample": ["--max_new_tokens", "6"],
    "evaluate": ["--max_new_tokens", "6"],
    "train": ["--max_steps", "2", "--disable_tqdm", "true", "--max_response_length", "6"],
    "iterate": ["--max_steps", "2", "--disable_tqdm", "true", "--max_new_tokens", "6"],
}
ONLINE = ["--online_max_new_tokens", "6"]


def commands(page: str) -> list[list[str]]:
    """A page's command lines, without the program's name and comments."""
    text = (PAGES / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.S | re.M)
    lines = [line for language, block in blocks if not language for line in block.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("fastrank ")]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the guide's reader has: prompts, a reward, and a ranked file held out."""
    rows = [{"prompt": "go " * (k % 4) + str(k)} for k in range(14)]
    for name, chosen in (("prompts", rows[:10]), ("heldout", rows[10:])):
        lines = [json.dumps(row) + "\n" for row in chosen]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    ranked = {"prompt": "go", "responses": ["ab", "cde"], "scores": [1.0, 0.0]}
    (tmp_path / "heldout_ranked.jsonl").write_text(json.dumps(ranked) + "\n")
    (tmp_path / "reward.py").write_text(
        "def score(prompt, response):\n    return sum(c in 'aeiou' for c in response) / 9\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_guide_leads_through_the_whole_path(folder, policy_path, other_policy_path, capsys):
    names = {"POLICY": str(policy_path), "OTHER": str(other_policy_path)}
    guide = commands("workflow.md")
    assert [line[0] for line in guide[:6]] == [
        *("sample", "reward", "inspect", "train", "evaluate", "score")
    ]
    for line in guide:
        arguments = [names.get(word, word) for word in line] + SMALL.get(line[0], [])
        if "--online_every" in line:
            arguments += ONLINE
        assert main(arguments) == 0, f"{' '.join(line)}: {capsys.readouterr().err}"
    rows = [json.loads(line) for line in (folder / "ranked.jsonl").read_text().splitlines()]
    assert len(rows) == 10 and all(row["scores"] for row in rows)
    sources = {source for row in rows for source in row["sources"]}
    assert sources == {str(policy_path), str(other_policy_path)}
    assert (folder / "runs" / "rrhf" / "model.safetensors").is_file()
    said = capsys.readouterr().out
    for word in ("perplexity", "won", "pairwise_accuracy"):
        assert word in said


@pytest.mark.parametrize("page", ["getting-started.md", "data.md", "from-trl.md", "memory.md"])
def test_commands_of_the_other_pages(page, folder, policy_path, capsys):
    """On the record that the pages show, and a file of options."""
    rows = [
        {"prompt": f"What is {k}?", "responses": ["Blue.", "A cat."], "scores": [0.9, 0.1]}
        for k in range(4)
    ]
    (folder / "ranked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run.yaml").write_text(
        f"model: {policy_path}\ndata: ranked.jsonl\noutput_dir: runs/yaml\n"
    )
    lines = commands(page)
    assert lines
    for line in lines:
        if "--load_in_4bit" in line:
            pytest.importorskip("bitsandbytes")
        arguments = [str(policy_path) if word == "MODEL" else word for word in line]
        assert main(arguments + SMALL.get(line[0], [])) == 0, capsys.readouterr().err
    if page == "getting-started.md":
        summary = json.loads((folder / "runs/yaml/summary.json").read_text())
        assert summary["data"][0]["records"]["kept"] == 4
