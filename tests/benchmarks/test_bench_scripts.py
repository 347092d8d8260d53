"""The scripts under bench/: tables of README and pages, goals and curves."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bench import curves, goals, tables
from fastrank.benchmarks.results import WRONG, Measurement, read_csv, write_csv

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def results(tmp_path, a_row):
    """A function that records a run, with these fields in fastrank's own row."""

    def write(**own: object) -> Path:
        rows = [
            a_row("slow", median_ms=1250.0, ratio=125.0, error=1e-6, peak_mib=64.0),
            a_row("quick", median_ms=12.0, ratio=1.2, error=1e-6, peak_mib=200.0),
            a_row("fastrank", **{"median_ms": 10.0, "ratio": 1.0, "error": 1e-7, **own}),
            a_row("liar", status=WRONG, reason="dhidden is off by 2"),
        ]
        write_csv(rows, tmp_path / "loss_cpu.csv")
        return tmp_path

    return write


PAGE = "before\n<!-- table: k5 -->\nold\n<!-- end -->\nbetween\n<!-- table: s2 -->\n<!-- end -->\n"


def test_tables_are_made_between_their_markers(results):
    page = tables.fill(PAGE, results())
    lines = page.splitlines()
    assert lines[0] == "before" and "between" in lines and "old" not in lines
    assert "| variant | ms | time / fastrank's | peak MiB | error |" in lines
    table = [line for line in lines if line.startswith("| ")][2:]
    assert [line.split(" | ")[0] for line in table] == ["| fastrank", "| quick", "| slow"]
    assert "| slow | 1,250 | 125.00 | 64 | 1e-06 |" in table
    assert "Without a figure: liar (wrong: dhidden is off by 2)." in lines
    # What was not measured is left out: the s2 table has no file.
    assert page.endswith("between\n<!-- table: s2 -->\n<!-- end -->\n")
    assert "K5-bf16" not in page and "ot measured" not in page


def test_tables_show_no_ratio_when_our_own_result_is_wrong(results):
    page = tables.fill(PAGE, results(status=WRONG, reason="loss is off by 1", median_ms=None))
    assert "time / fastrank's" not in page and "125.00" not in page


def test_variants_have_the_names_of_today(tmp_path, a_row):
    rows = [a_row("fastrank, paths", "A1-512-cpu", median_ms=1.0)]
    write_csv(rows, tmp_path / "attention_cpu.csv")
    assert "| fastrank, segmentwise |" in tables.make("a1", tmp_path)


def test_tables_command_checks_and_rewrites(tmp_path, results, monkeypatch):
    readme = tmp_path / "README.md"
    readme.write_text(PAGE)
    folder = results()

    def run(*arguments: str) -> int:
        given = ["bench.tables", f"--file={readme}", f"--results={folder}", *arguments]
        monkeypatch.setattr(sys, "argv", given)
        return tables.main()

    assert run("--check") == 1 and readme.read_text() == PAGE
    assert run() == 0 and readme.read_text() != PAGE
    assert run("--check") == 0


@pytest.mark.parametrize("page", ["<!-- table: k5 -->\nno end", "<!-- table: x -->\n<!-- end -->"])
def test_wrong_markers_are_errors(page: str, tmp_path):
    with pytest.raises(ValueError, match="expected an <!-- end -->|table must be one of"):
        tables.fill(page, tmp_path)


@pytest.mark.parametrize("file", tables.PAGES, ids=lambda file: file.name)
def test_the_pages_are_up_to_date(file):
    page = file.read_text(encoding="utf-8")
    assert "<!-- table:" in page and tables.fill(page) == page


def test_no_page_with_tables_is_forgotten():
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    assert [page for page in pages if "<!-- table:" in page.read_text()] == tables.PAGES


def test_the_brief_table_has_the_measured_times():
    rows = [
        line.split(" | ") for line in tables.make("brief").splitlines() if line.startswith("| ")
    ]
    own = {row[0].strip("| "): row for row in rows if row[1] == "fastrank"}
    recorded = {
        (row.workload, row.variant): row
        for suite in ("loss", "step")
        for row in read_csv(tables.RESULTS / f"{suite}_cpu.csv", Measurement)
    }
    assert own.keys() == {"K5", "S2"}
    for workload, row in own.items():
        measured = recorded[workload, "fastrank"]
        assert row[2:4] == [f"{measured.median_ms:,.0f}", "1.00"]


def test_a_gpu_s_tables_come_with_their_heading(tmp_path, a_row):
    assert tables.make("gpu-loss", tmp_path) == ""
    write_csv([a_row("fastrank", "K3", median_ms=1.0)], tmp_path / "loss_cuda.csv")
    made = tables.make("gpu-loss", tmp_path)
    assert made.startswith("## On a GPU: the fused loss\n\n**K3**") and "K1" not in made


def test_goals_are_held_against_rows(a_row):
    rows = [
        a_row("fastrank", median_ms=10.0, ratio=1.0, peak_mib=50.0, floor_share=0.8),
        a_row("plain PyTorch", median_ms=11.0, ratio=1.1, peak_mib=100.0),
        a_row("F.linear_cross_entropy", median_ms=15.0, ratio=1.5, peak_mib=90.0),
    ]
    found = {(g.workload, g.what): g.check(rows) for g in goals.CPU_GOALS}
    assert found["K5", "plain PyTorch over fastrank"] == (1.1, True)
    assert found["K5", "F.linear_cross_entropy over fastrank"] == (1.5, False)
    assert found["K5", "peak memory, of plain PyTorch's"] == (0.5, False)
    assert found["S2", "published loop over fastrank"] == (None, None)
    text = goals.goals_table(goals.CPU_GOALS, rows)
    assert "| at least 1.7 | 1.5 | **missed** |" in text and "| not measured |" in text


def test_goals_of_a_gpu(a_row):
    own = {"median_ms": 10.0, "ratio": 1.0, "floor_ms": 8.0, "floor_share": 0.8, "traffic_ms": 1.5}
    rows = [
        a_row("fastrank", "K1", **own),
        a_row("plain PyTorch", "K1", median_ms=9.0, ratio=0.9),  # holds all logits: no streaming
        a_row("TRL ChunkedLogProb", "K1", median_ms=18.0, ratio=1.8),
        a_row("F.linear_cross_entropy", "K1", median_ms=13.0, ratio=1.3),
        a_row("fastrank", "K2", **own),
        a_row("fastrank", "K4", **own),
        a_row("fastrank", "A1-256", median_ms=12.0, ratio=1.0),
        a_row("dense mask", "A1-256", median_ms=8.0, ratio=0.625),
    ]
    found = {(g.workload, g.what): g.check(rows) for g in goals.GPU_GOALS}
    assert found["K1", "fastrank over the floor"] == (1.25, False)
    assert found["K1", "liger scaled CE, Hopper over fastrank"] == (None, None)
    assert found["K1", "fastest streaming peer over fastrank"] == (1.3, True)
    assert found["K1", "TRL over fastrank"] == (1.8, True)
    assert found["K2", "fastest streaming peer over fastrank"] == (None, None)
    assert found["K4", "fastrank over floor and traffic"] == (pytest.approx(10 / 9.5), True)
    assert found["A1-256", "fastrank's choice over the fastest"] == (1.6, False)


def test_a_goal_without_a_right_result_of_our_own_is_not_measured(a_row):
    rows = [a_row("fastrank", status=WRONG), a_row("plain PyTorch", median_ms=1.0)]
    assert all(goal.check(rows) == (None, None) for goal in goals.CPU_GOALS)


def test_curves_take_their_values_and_are_drawn(tmp_path, a_row):
    known = {curve.name: curve for curve in curves.CURVES}
    ends = {name: (curve.values[0], curve.values[-1]) for name, curve in known.items()}
    ends.pop("crossover")
    assert ends == {"n": (2, 64), "P": (64, 4096), "R": (32, 1024), "V": (32768, 262144)}
    assert [w.response for w in known["R"].workloads()][:2] == [32, 128]
    rows = [
        a_row(variant, f"n={n}", median_ms=float(n * k))
        for n in (2, 4)
        for k, variant in enumerate(("fastrank", "published loop"), 1)
    ]
    assert [path.name for path in curves.plot_curves(rows, tmp_path)] == ["scaling_n_cpu.png"]
    assert (tmp_path / "scaling_n_cpu.png").stat().st_size > 5000
    wrong = [*rows, a_row("fastrank", "n=8", status=WRONG)]
    assert curves.plot_curves(wrong, tmp_path) == []
