"""The examples run as they stand, on small models and data, and do what they are for."""

from __future__ import annotations

import json
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_models import save_llama

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
#: Longer answers are better ones.
RANKED = [
    {"prompt": f"q{k} ", "responses": ["a" * (k % 3 + 1), "b", "c c c c"], "scores": [0.5, 0, 1]}
    for k in range(20)
]
PAIRS = [{"prompt": f"q{k} ", "chosen": "yes yes", "rejected": "no"} for k in range(12)]


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], write_rows: Callable[..., Path],
) -> Callable[..., str]:  # fmt: skip
    """Run an example with a small model and what follows it; returns what it printed."""
    monkeypatch.chdir(tmp_path)
    model = save_llama(tmp_path / "model", max_position_embeddings=1024)
    for name, rows in (("ranked", RANKED), ("pairs", PAIRS), ("queries", RANKED[:6])):
        write_rows(rows, f"{name}.jsonl")

    def script(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, str(model), *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return script


def test_a_script_of_trl(run, tmp_path) -> None:
    said = run("trl_migration.py", "pairs.jsonl", "runs/dpo")
    assert (tmp_path / "runs/dpo/adapter_model.safetensors").is_file()
    assert "eval_share_of_wins" in said


def test_a_loss_of_ones_own(run, tmp_path) -> None:
    said = run("own_loss.py", "ranked.jsonl", "runs/own")
    # softmax of (-1, -2, -3) and (-1.5, -1) on regrets (1, 0, 0.5) and (0, 1), halved
    assert "expected regret 0.666" in said and "loss " in said
    assert (tmp_path / "runs/own/model.safetensors").is_file()


def test_a_loop_of_ones_own(run, tmp_path) -> None:
    said = run("own_loop.py", "ranked.jsonl", "runs/loop", "6")
    losses = [float(x) for x in re.findall(r"loss (\d+\.\d+)", said)]
    assert len(losses) == 6 and "step 6 | held-out accuracy" in said
    assert (tmp_path / "runs/loop/model.safetensors").is_file()


def test_a_worker_takes_padded_batches(run) -> None:
    said = run("packs_in_a_verl_like_worker.py")
    losses = [float(x) for x in re.findall(r"'actor/loss': (\d+\.\d+)", said)]
    assert len(losses) == 5 and losses[-1] < losses[0]


def test_a_reranker(run) -> None:
    said = run("reranker.py", "ranked.jsonl", "queries.jsonl", "runs/reranker")
    places = re.findall(r"^(\d)\. .*\((-\d+\.\d+)\)$", said, re.M)
    assert [place for place, _ in places] == ["1", "2", "3"]
    assert sorted((float(s) for _, s in places), reverse=True) == [float(s) for _, s in places]
    assert re.search("before: .*ndcg", said) and re.search("after: .*ndcg", said)


def test_the_notebook_runs() -> None:
    """Its cells in order, in one namespace; a slow test does the same in a kernel."""
    names: dict = {}
    for code in _cells("first_steps.ipynb"):
        exec(compile(code, "first_steps.ipynb", "exec"), names)
    assert names["packed"] < names["padded"]
    assert names["losses"][-1] < names["losses"][0] and names["after"] > names["before"]


@pytest.mark.slow
def test_the_notebook_runs_in_a_kernel() -> None:
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(EXAMPLES / "first_steps.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    outputs = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    assert all(outputs[:-1]) and "accuracy on held-out prompts" in outputs[-1][0]["text"]


def _cells(name: str) -> list[str]:
    notebook = json.loads((EXAMPLES / name).read_text(encoding="utf-8"))
    assert all(not cell.get("outputs") for cell in notebook["cells"])  # diffs stay readable
    return ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]


def test_every_example_is_run_and_short() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    found = [path for path in EXAMPLES.iterdir() if path.is_file()]
    assert len(found) >= 6
    for path in found:
        assert f'"{path.name}"' in text, path.name
        lines = sum(len(code.splitlines()) for code in _cells(path.name)) if (
            path.suffix == ".ipynb"
        ) else len(path.read_text(encoding="utf-8").splitlines())  # fmt: skip
        assert lines < 80, (path.name, lines)
