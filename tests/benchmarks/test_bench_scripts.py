"""The scripts under bench/: README tables, goals, and the GPU suite's dry run."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastrank.benchmarks import products, report, scaling
from fastrank.benchmarks.runner import OK, WRONG, Row

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "bench"


def load(name: str):
    sys.path.insert(0, str(BENCH))
    try:
        spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCH))
    return module


def a_row(variant: str, workload: str = "K5", **fields: object) -> Row:
    sizes = dict.fromkeys(
        ["tokens", "groups", "candidates", "response", "prompt", "vocab", "hidden"], 3
    )
    text = {"suite": "loss", "sizes": "4 x 4", "device": "cpu", "dtype": "float32", "loss": "rrhf"}
    row = {**sizes, **text, "workload": workload, "variant": variant, "ours": False, **fields}
    return Row(**row)


def results(folder: Path, **own: object) -> Path:
    fastrank = {"ours": True, "median_ms": 10.0, "ratio": 1.0, "error": 1e-7, **own}
    rows = [
        a_row("slow", median_ms=1250.0, ratio=125.0, error=1e-6, peak_mib=64.0),
        a_row("quick", median_ms=12.0, ratio=1.2, error=1e-6, peak_mib=200.0),
        a_row("fastrank", **fastrank),
        a_row("liar", status=WRONG, reason="dhidden is off by 2"),
    ]
    report.write_csv(rows, folder / "loss_cpu.csv")
    return folder


PAGE = "before\n<!-- table: k5 -->\nold\n<!-- end -->\nbetween\n<!-- table: s2 -->\n<!-- end -->\n"


def test_tables_are_made_between_their_markers(tmp_path):
    page = load("tables").render(PAGE, results(tmp_path))
    lines = page.splitlines()
    assert lines[0] == "before" and "between" in lines and "old" not in lines
    assert "| variant | ms | time / fastrank's | peak MiB | error |" in lines
    table = [line for line in lines if line.startswith("| ")][2:]
    assert [line.split(" | ")[0] for line in table] == ["| fastrank", "| quick", "| slow"]
    assert "| slow | 1,250 | 125.00 | 64 | 1e-06 |" in table
    assert "Without a figure: liar (wrong: dhidden is off by 2)." in lines
    assert "K5-bf16: not measured." in lines
    assert "Not measured yet." in lines  # the s2 table: no such file


def test_tables_show_no_ratio_when_our_own_result_is_wrong(tmp_path):
    folder = results(tmp_path, status=WRONG, reason="loss is off by 1", median_ms=None)
    page = load("tables").render(PAGE, folder)
    assert "time / fastrank's" not in page and "125.00" not in page


def test_tables_command_checks_and_rewrites(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(PAGE)
    results(tmp_path)

    def run(*arguments: str) -> int:
        command = [sys.executable, str(BENCH / "tables.py"), f"--file={readme}"]
        return subprocess.run([*command, f"--results={tmp_path}", *arguments], cwd=ROOT).returncode

    assert run("--check") == 1 and readme.read_text() == PAGE
    assert run() == 0 and readme.read_text() != PAGE
    assert run("--check") == 0


@pytest.mark.parametrize("page", ["<!-- table: k5 -->\nno end", "<!-- table: x -->\n<!-- end -->"])
def test_wrong_markers_are_errors(page: str, tmp_path):
    with pytest.raises(ValueError, match="expected an <!-- end -->|table must be one of"):
        load("tables").render(page, tmp_path)


def test_the_readme_is_up_to_date():
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    if "<!-- table:" not in page:
        pytest.skip("README.md holds no generated table")
    assert load("tables").render(page) == page


def test_goals_are_held_against_rows():
    goals = load("goals")
    rows = [
        a_row("fastrank", ours=True, median_ms=10.0, ratio=1.0, peak_mib=50.0, floor_share=0.8),
        a_row("plain PyTorch", median_ms=11.0, ratio=1.1, peak_mib=100.0),
        a_row("F.linear_cross_entropy", median_ms=15.0, ratio=1.5, peak_mib=90.0),
    ]
    found = {(g.workload, g.what): g.check(rows) for g in goals.CPU_GOALS}
    assert found["K5", "plain PyTorch over fastrank"] == (1.1, True)
    assert found["K5", "F.linear_cross_entropy over fastrank"] == (1.5, False)
    assert found["K5", "peak memory, of plain PyTorch's"] == (0.5, False)
    assert found["S2", "published loop over fastrank"] == (None, None)
    text = goals.table(goals.CPU_GOALS, rows)
    assert "| at least 1.7 | 1.5 | **missed** |" in text and "| not measured |" in text


def test_goals_of_a_gpu():
    goals = load("goals")
    rows = [
        a_row("fastrank", "K1", ours=True, median_ms=10.0, ratio=1.0, floor_ms=8.0,
              floor_share=0.8, traffic_ms=1.5),
        a_row("plain PyTorch", "K1", median_ms=9.0, ratio=0.9),  # holds all logits: no streaming
        a_row("TRL ChunkedLogProb", "K1", median_ms=18.0, ratio=1.8),
        a_row("F.linear_cross_entropy", "K1", median_ms=13.0, ratio=1.3),
    ]  # fmt: skip
    found = {(g.workload, g.what): g.check(rows) for g in goals.GPU_GOALS}
    assert found["K1", "fastrank over the floor"] == (1.25, False)
    assert found["K1", "fastest streaming peer over fastrank"] == (1.3, True)
    assert found["K1", "TRL over fastrank"] == (1.8, True)
    own = {row.variant: row for row in rows}
    assert goals.over_floor_and_traffic(own) == pytest.approx(10 / 9.5)


def test_a_goal_without_a_right_result_of_our_own_is_not_measured():
    goals = load("goals")
    rows = [a_row("fastrank", ours=True, status=WRONG), a_row("plain PyTorch", median_ms=1.0)]
    assert all(goal.check(rows) == (None, None) for goal in goals.CPU_GOALS)


def test_products_in_place_are_counted():
    a, out = torch.ones(4, 4), torch.zeros(4, 4)

    def step() -> None:
        out.addmm_(a, a)
        torch.addmm(out, a, a, out=out)
        torch.mm(a, a)

    assert products.count(step, 2 * 4**3) == pytest.approx(3)


def test_curves_take_their_values_and_are_drawn(tmp_path):
    curves = {curve.name: curve for curve in scaling.CURVES}
    assert curves["n"].values[0] == 2 and curves["n"].values[-1] == 64
    assert (curves["P"].values[0], curves["P"].values[-1]) == (64, 4096)
    assert (curves["R"].values[0], curves["R"].values[-1]) == (32, 1024)
    assert (curves["V"].values[0], curves["V"].values[-1]) == (32768, 262144)
    assert [w.response for w in curves["R"].workloads()][:2] == [32, 128]
    rows = [
        a_row(variant, f"n={n}", ours=variant == "fastrank", median_ms=float(n * k))
        for n in (2, 4)
        for k, variant in enumerate(("fastrank", "published loop"), 1)
    ]
    assert [path.name for path in scaling.plot_curves(rows, tmp_path)] == ["scaling_n_cpu.png"]
    assert (tmp_path / "scaling_n_cpu.png").stat().st_size > 5000
    wrong = [*rows, a_row("fastrank", "n=8", ours=True, status=WRONG)]
    assert scaling.plot_curves(wrong, tmp_path) == []


def suite_without_units(folder: Path, monkeypatch: pytest.MonkeyPatch, *units: int):
    suite = load("gpu_suite")
    monkeypatch.setattr(suite, "UNITS", [suite.UNITS[i] for i in units])
    arguments = ["gpu_suite", "--dry_run", "--no_tests", "--output", str(folder)]
    monkeypatch.setattr(sys, "argv", arguments)
    return suite


def test_gpu_suite_walks_through_a_unit(tmp_path, monkeypatch):
    suite = suite_without_units(tmp_path / "out", monkeypatch, 4)
    assert suite.main() == 0
    rows = report.read_csv(tmp_path / "out" / "rank_cpu.csv")
    assert {row.workload for row in rows} == set(suite.UNITS[0].workloads)
    assert all(row.timed for row in rows if row.variant == "fastrank")
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert "R1-64x8: 2 x 8" in summary and "## Goals" not in summary


def test_gpu_suite_names_what_broke_and_what_had_no_time(tmp_path, monkeypatch):
    suite = suite_without_units(tmp_path, monkeypatch, 4, 5)
    ends = iter([("Segmentation fault", -11), ("", None)])
    monkeypatch.setattr(suite, "_run", lambda *a: next(ends))
    assert suite.main() == 1
    summary = (tmp_path / "summary.md").read_text()
    assert "exit -11: Segmentation fault" in summary
    assert "A1-2048, A1-512, A1-256: stopped after" in summary


def test_gpu_suite_stops_a_process_that_takes_too_long():
    suite = load("gpu_suite")
    script = "import time; print('begun', flush=True); time.sleep(60)"
    output, code = suite._run([sys.executable, "-c", script], 3.0, False)
    assert code is None and output.strip() == "begun"


@pytest.mark.slow
def test_gpu_suite_dry_run(tmp_path):
    command = [sys.executable, str(BENCH / "gpu_suite.py"), "--dry_run", f"--output={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stdout + done.stderr
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) <= 8 and max(p.stat().st_size for p in tmp_path.iterdir()) < 16 << 20
    assert names == [
        "attention_cpu.csv", "loss_cpu.csv", "rank_cpu.csv", "step_cpu.csv", "summary.md",
        "tests.txt",
    ]  # fmt: skip
    rows = [row for path in tmp_path.glob("*.csv") for row in report.read_csv(path)]
    measured = {row.workload for row in rows if row.variant == "fastrank" and row.status == OK}
    assert {"K1", "K2", "K3", "K4", "A1-2048", "S1-qwen", "S1-llama"} <= measured
    assert "tests collected" in (tmp_path / "summary.md").read_text()
