"""The GPU suite, walked through on a CPU: order, crashes, deadlines, verdicts and merging."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("triton")

from bench import gpu_suite, gpu_travel  # noqa: E402
from bench.gpu_kernels import KernelRow  # noqa: E402
from bench.gpu_suite import Suite, Unit  # noqa: E402
from bench.gpu_unit import begun_path, measure_peers, tiny  # noqa: E402
from fastrank.benchmarks import rank_suite, runner  # noqa: E402
from fastrank.benchmarks.problem import Variant, build_problem  # noqa: E402
from fastrank.benchmarks.results import (  # noqa: E402
    FAILED,
    MISSING,
    OK,
    Measurement,
    read_csv,
    write_csv,
)
from fastrank.benchmarks.runner import RunPlan  # noqa: E402
from fastrank.benchmarks.workloads import WORKLOADS  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
RANK = "R1-64x8"


@pytest.fixture
def suite(tmp_path, monkeypatch) -> Suite:
    """A dry run of one workload, with time enough."""
    monkeypatch.setattr(gpu_suite, "UNITS", [Unit(RANK, 1, 0.0)])
    return Suite(tmp_path, time.monotonic() + 500, dry_run=True, commit="abc")


def rows_by_variant(suite: Suite) -> dict[str, Measurement]:
    return {row.variant: row for row in suite.rows}


def test_our_own_are_measured_and_written_then_the_peers(suite):
    suite.run_own(1.0)
    (csv,) = suite.folder.glob("*.csv")
    first = read_csv(csv, Measurement)
    assert {row.variant for row in first if row.status == OK} == {
        "fastrank", "fastrank.rank_tokens",
    }  # fmt: skip
    assert all(row.ours for row in first)
    suite.run_peers()
    after = {row.variant: row for row in read_csv(csv, Measurement)}
    for row in first:
        assert after[row.variant] == row  # the peers' turn changes nothing that stands
    assert after["plain PyTorch"].ratio is not None and after["published loop"].status == OK
    assert suite.is_complete()
    log = (suite.folder / "log.txt").read_text()
    assert "==== R1-64x8" in log and "==== R1-64x8 --peers" in log and "check fastrank" in log


def test_a_peer_that_kills_its_process_costs_itself_alone(suite, monkeypatch):
    """Three processes: one dies of its second peer, one is killed in its third, one ends."""
    plain, compiled, loop = (
        Measurement(**{**dataclasses.asdict(suite._broken(RANK, name, "")), "status": OK})
        for name in ("plain PyTorch", "torch.compile of plain", "published loop")
    )
    ends = iter([([plain], "torch.compile of plain", -11), ([loop], None, 0)])
    asked = []

    def run(self, what, command, seconds, path=None):
        asked.append(command)
        csv = Path(next(word for word in command if word.startswith("--csv=")).partition("=")[2])
        rows, begun, code = next(ends)
        write_csv(rows, csv)
        if begun:
            begun_path(csv).write_text(begun)
        return "line\nSegmentation fault", code

    monkeypatch.setattr(Suite, "_run", run)
    suite.run_peers()
    rows = rows_by_variant(suite)
    assert rows["plain PyTorch"].status == rows["published loop"].status == OK
    broken = rows[compiled.variant]
    assert broken.status == FAILED and broken.reason == "exit -11: Segmentation fault"
    assert asked[1][asked[1].index("--skip") + 1 :] == ["plain PyTorch", compiled.variant]
    assert not suite.notes


def test_a_peer_that_hangs_is_named(suite, monkeypatch):
    def run(self, what, command, seconds, path=None):
        csv = Path(next(word for word in command if word.startswith("--csv=")).partition("=")[2])
        begun_path(csv).write_text("published loop")
        return "begun", None

    monkeypatch.setattr(Suite, "_run", run)
    suite.run_peers()
    assert rows_by_variant(suite)["published loop"].reason.startswith("stopped after")
    assert suite.notes and not suite.is_complete()


def test_a_process_of_our_own_that_breaks_is_a_note(suite, monkeypatch):
    monkeypatch.setattr(Suite, "_run", lambda *a, **k: ("CUDA error", 1))
    suite.run_own(1.0)
    assert suite.notes == ["R1-64x8: exit 1: CUDA error"] and not suite.is_complete()
    assert "exit 1: CUDA error" in (suite.folder / "summary.md").read_text()


def test_rows_are_written_before_the_next_peer_is_touched(tmp_path, monkeypatch):
    workload, csv = tiny(WORKLOADS[RANK]), tmp_path / "rows.csv"
    seen = []

    def dies(problem):
        seen.append([row.variant for row in read_csv(csv, Measurement)])
        seen.append(begun_path(csv).read_text())
        raise SystemExit(9)

    kept = [v for v in rank_suite.VARIANTS if v.name in ("fastrank", "plain PyTorch")]
    monkeypatch.setattr(rank_suite, "VARIANTS", [*kept, Variant("bad", dies)])
    with pytest.raises(SystemExit):
        measure_peers(workload, runner.torch.device("cpu"), RunPlan(seconds=0, memory=False), csv)
    assert seen == [["plain PyTorch"], "bad"]


def test_a_deadline_skips_peers_but_nothing_of_our_own():
    workload = tiny(WORKLOADS[RANK])
    names = ["fastrank", "fastrank.rank_tokens", "plain PyTorch"]
    plan = RunPlan(seconds=0, memory=False, deadline=0.0, only=names)
    device = runner.torch.device("cpu")
    rows = runner.run_workload(workload, device, plan, problem=build_problem(workload, device))
    assert [row.status for row in rows] == [OK, OK, MISSING]
    assert rows[0].timed and rows[2].reason == "no time left"


@pytest.mark.parametrize(
    ("script", "verdict"),
    [
        ("def test_a(): pass", "1 passed"),
        ("import pytest\ndef test_a(): pytest.skip()", "failed: nothing passed: 1 skipped"),
        ("def test_a(): assert 1 == 2\ndef test_b(): pass", "failed: 1 failed, 1 passed"),
        ("import nothing_of_that_name", "failed: 1 error"),
        ("", "failed: no tests ran"),
    ],
)
def test_verdicts(script: str, verdict: str, tmp_path):
    path = tmp_path / "test_it.py"
    path.write_text(script)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts="]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(
        [*command, str(path)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    found = gpu_suite._verdict(done.stdout, done.returncode, 9.0, False)
    assert found.startswith(verdict)


def test_failures_are_told_when_they_happen(tmp_path, suite):
    """Also by xdist's workers, and though the run never ends."""
    script = "import time\ndef test_a(): assert 1 == 2\ndef test_b(): time.sleep(60)"
    (tmp_path / "test_it.py").write_text(script)
    command = [sys.executable, "-m", "pytest", "-p", "bench.failures_at_once", "-n", "2"]
    command += ["-p", "no:cacheprovider", "-o", "addopts=", str(tmp_path / "test_it.py")]
    output, code = suite._run("tests", command, 14.0, tmp_path / "tests.txt")
    assert code is None and ">>> failure in call" in output and "assert 1 == 2" in output
    verdict = gpu_suite._verdict(output, code, 14.0, False)
    assert verdict == "failed: not finished in 14 s, 1 failures until then"


def test_stages_that_ran_apart_are_merged(tmp_path, suite, monkeypatch):
    own, peers = tmp_path / "own", tmp_path / "peers"
    for folder in (own, peers):
        folder.mkdir()
    row = dataclasses.replace(suite._broken(RANK, "fastrank", ""), status=OK, median_ms=1.0)
    write_csv([row], own / "rank_cpu.csv")
    write_csv([dataclasses.replace(row, variant="peer", ratio=2.0)], peers / "rank_cpu.csv")
    write_csv([KernelRow("K1", "gemm", 1, 5.0, None)], own / "kernels.csv")
    (own / "summary.md").write_text("Tests marked gpu: 9 passed\n")
    (peers / "summary.md").write_text("Tests marked gpu: not asked for\n")
    arguments = ["gpu_suite", "--dry_run", "--stages", "--include", str(own), str(peers)]
    monkeypatch.setattr(sys, "argv", [*arguments, "--output", str(tmp_path / "all")])
    assert gpu_suite.main() == 0
    rows = read_csv(tmp_path / "all" / "rank_cpu.csv", Measurement)
    assert [row.variant for row in rows] == ["fastrank", "peer"]
    summary = (tmp_path / "all" / "summary.md").read_text()
    assert "Tests marked gpu: 9 passed" in summary and "| K1 | `gemm` |" in summary


def test_a_goal_that_was_not_measured_is_no_success(tmp_path, suite, monkeypatch):
    """A GPU's files, merged where there is none."""
    came, out = tmp_path / "own", tmp_path / "all"
    came.mkdir()
    row = dataclasses.replace(
        suite._broken(RANK, "fastrank", ""), status=OK, median_ms=1.0, device="cuda",
        device_name="GPU X", ours=True,
    )  # fmt: skip
    write_csv([row], came / "rank_cuda.csv")
    arguments = ["gpu_suite", "--stages", "--include", str(came), "--output", str(out)]
    monkeypatch.setattr(sys, "argv", arguments)
    assert gpu_suite.main() == 1
    summary = (out / "summary.md").read_text()
    assert "GPU X" in summary and "not measured" in summary
    assert read_csv(out / "rank_cuda.csv", Measurement) == [row]


def test_without_a_gpu_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_suite.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_suite", "--output", str(tmp_path / "out")])
    assert gpu_suite.main() == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_calls_fit_the_machine():
    for call in gpu_travel.calls("travel", "0123456789ab"):
        assert len(call.command) < 2000 and call.seconds < 600
    assert "--include own tests peers cutlass" in gpu_travel.merge_command()


@pytest.mark.slow
def test_the_printed_commands_of_a_dry_run(tmp_path):
    """One workload of each kind through every command, from the preparation to the merge."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels' / 'torch-ext'}",
    }

    def run(command: list[str], folder: Path, **variables: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            command, cwd=folder, env=environment | variables, capture_output=True, text=True
        )

    workloads = ["K1-autocast", "S1-qwen", "A1-256", RANK]
    options = ["--dry_run", "--workloads", *workloads]
    printed = run([sys.executable, "-m", "bench.gpu_travel", *options], ROOT)
    assert printed.returncode == 0, printed.stderr
    lines = printed.stdout.splitlines()
    names = [line[2:].partition(":")[0] for line in lines if line.startswith("# ")][:-1]
    *commands, merge = [line for line in lines if not line.startswith("# ")]
    assert names == ["own", "tests", "peers"] and len(commands) == 3
    for name, command in zip(names, commands, strict=True):
        done = run(["bash", "-c", command], ROOT, OUT=str(tmp_path / name))
        assert done.returncode == 0, (name, done.stdout, done.stderr)
    done = run(["bash", "-c", merge], tmp_path)
    assert done.returncode == 0, (done.stdout, done.stderr)
    merged = tmp_path / "bench" / "results"
    rows = [row for path in merged.glob("*_cpu.csv") for row in read_csv(path, Measurement)]
    for workload in workloads:
        found = {row.variant: row for row in rows if row.workload == workload}
        assert any(row.ours and row.status == OK for row in found.values()), workload
        others = [row for row in found.values() if not row.ours]
        # What is not here is named, and what is here was timed; a dry run compiles nothing.
        assert others and all(row.ratio or row.reason for row in others)
        failed = [row.variant for row in others if row.status == FAILED]
        assert all("torch.compile" in name or "torch_compile" in name for name in failed), failed
    summary = (merged / "summary.md").read_text()
    assert "Tests marked gpu: " in summary and " tests collected" in summary
    assert "## Kernels" in summary
    # The same files hold nothing that a goal asks for.
    done = run(["bash", "-c", gpu_travel.merge_command().replace(" cutlass", "")], tmp_path)
    assert done.returncode == 1 and "not measured" in (merged / "summary.md").read_text()
