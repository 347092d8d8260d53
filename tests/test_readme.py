"""The README: its code runs as printed, gives what plain code gives, and it is short."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from padded_batch import padded_batch

import fastrank

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = dict(re.findall(r"<!-- snippet: (.+?) -->\n```python\n(.*?)```", README, re.S))


def one_prompt() -> dict[str, Any]:
    """What a training script has for one prompt of three candidates."""
    names = padded_batch()
    for name in ("input_ids", "labels", "mask", "rewards"):
        names[name] = names[name][2:]
    return names


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def test_the_five_lines_give_what_today_s_give() -> None:
    names = one_prompt()
    exec(SNIPPETS["today"], names)
    assert names["loss"].item() > 1
    names["loss"].backward()
    expected = gradients(names["model"])
    exec(SNIPPETS["rank"], names)
    torch.testing.assert_close(names["out"].loss, names["loss"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(names["out"].scores, names["scores"].detach(), rtol=1e-5, atol=1e-5)
    for name, gradient in gradients(names["model"]).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


def test_packs_give_the_gradient_of_the_padded_batch() -> None:
    names = padded_batch()
    model, loss = names["model"], fastrank.PRO()
    rewards = [group.rewards for group in names["groups"]]
    fastrank.rank(model, names["input_ids"], names["labels"], rewards, loss=loss).loss.backward()
    expected = gradients(model)
    exec(SNIPPETS["packs"], names)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


def test_the_trainer_trains(
    policy_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (record,) = re.findall(r"```json\n(.*?)```", README, re.S)
    row = json.loads(record)
    rows = [{**row, "prompt": f"{row['prompt']} {number}"} for number in range(5)]
    Path("ranked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "Qwen/Qwen3-0.6B" in SNIPPETS["trainer"]
    names: dict[str, Any] = {}
    exec(SNIPPETS["trainer"].replace("Qwen/Qwen3-0.6B", str(policy_path)), names)
    assert names["trainer"].state.global_step == 6  # three epochs of two steps
    assert Path("runs/first/model.safetensors").is_file()


def test_every_block_is_tested() -> None:
    assert set(SNIPPETS) == {"today", "rank", "packs", "trainer"}
    assert len(re.findall(r"^```python$", README, re.M)) == len(SNIPPETS)


def test_it_is_one_screen_and_a_half() -> None:
    assert len(README.splitlines()) <= 180
    assert "docs/pictures/pack.svg" in README and "ot measured" not in README


def test_every_link_leads_somewhere() -> None:
    """Files and headings of all pages, within the repository."""
    pages = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    found = 0
    for page in [*pages, *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            if "://" in target:
                continue
            path, _, heading = target.partition("#")
            file = page.parent / path if path else page
            assert file.exists(), f"{page.name}: {target}"
            if heading:
                titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.M)
                slugs = {
                    re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles
                }
                assert heading in slugs, f"{page.name}: {target}"
            found += 1
    assert found > 40
