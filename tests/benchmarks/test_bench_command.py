"""``fastrank bench``: its output, its files and its refusals."""

from __future__ import annotations

import json

import pytest

from fastrank.benchmarks import loss_peers
from fastrank.benchmarks.problem import Variant
from fastrank.benchmarks.results import Measurement, read_csv
from fastrank.cli.main import main

TINY = "--groups 2 --candidates 3 --response 4 --vocab 101 --hidden 16 --seconds 0".split()
FAST = ["--variant", "fastrank", "plain PyTorch", "TRL ChunkedLogProb", "--no_memory"]


def bench(*arguments: str) -> int:
    return main(["bench", "--suite", "loss", "--device", "cpu", *arguments])


def test_a_run_prints_a_table_and_writes_the_csv(tmp_path, capsys):
    folder = tmp_path / "new" / "folder"
    code = bench("--workload", "K5", "K5-bf16", *TINY, *FAST, "--output", str(folder), "--json")
    assert code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("  K5: fastrank: right, error ")
    assert lines[1].startswith("  K5: plain PyTorch: right, error ")
    assert any(line.startswith("K5: 2 x 3 x 4, V 101, D 16, float32 on ") for line in lines[2:4])
    rows = read_csv(folder / "loss_cpu.csv", Measurement)
    assert [row.workload for row in rows] == ["K5"] * 3 + ["K5-bf16"] * 3
    assert {row.vocab for row in rows} == {101}
    result = json.loads(lines[-1])
    assert len(result["rows"]) == 6
    assert [f"  {sentence}" in lines for sentence in result["verdicts"]] == [True, True]


def test_sizes_alone_ask_about_one_shape(capsys, monkeypatch):
    """fastrank beside what runs at once, and not the workloads that the suite records."""
    kept = ["fastrank", "plain PyTorch", "torch.compile of plain", "published loop", "TRL"]
    peers = [v for v in loss_peers.VARIANTS if v.name.startswith(tuple(kept))]
    monkeypatch.setattr(loss_peers, "VARIANTS", peers)
    assert bench(*TINY, "--no_memory", "--json") == 0
    out = capsys.readouterr().out
    rows = json.loads(out.splitlines()[-1])["rows"]
    assert {row["workload"] for row in rows} == {"your shape"}
    assert [row["variant"] for row in rows] == ["fastrank", "plain PyTorch", "TRL ChunkedLogProb"]
    assert "your shape: 2 x 3 x 4, V 101, D 16, float32" in out
    assert "  fastrank takes " in out and ", plain PyTorch " in out


def test_a_red_gate_ends_in_code_1_and_no_speed_up(monkeypatch, capsys):
    def wrong(problem):
        step = loss_peers._make_fused(problem)

        def doubled():
            outputs = step()
            return {**outputs, "dhidden": 2 * outputs["dhidden"]}

        return doubled

    peers = [Variant("fastrank", wrong, ours=True)]
    peers += [v for v in loss_peers.VARIANTS if v.name == "plain PyTorch"]
    monkeypatch.setattr(loss_peers, "VARIANTS", peers)
    assert bench("--workload", "K5", *TINY, "--no_memory") == 1
    out = capsys.readouterr().out
    assert "wrong: fastrank: dhidden is off by 1.0e+00" in out
    assert "time / fastrank's" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workload", "S2"], "--workload of suite loss must be one of K1, K2"),
        (
            ["--workload", "K5", "--tokens", "100"],
            "--tokens must be a multiple of candidates x response = 512, got 100",
        ),
        (["--tokens", "0"], "--tokens must be at least 1, got 0"),
        (["--vocab", "-3"], "--vocab must be at least 1, got -3"),
        (["--accuracy", "1.5"], "--accuracy must lie between 0 and 1, got 1.5"),
        (["--suite", "rank", "--vocab", "5"], "--vocab is no size of suite rank, which has groups"),
        (["--suite", "step", "--model", "gpt"], "--model must be one of qwen2.5-0.5b, "),
        (["--variant", "nonsense"], "--variant must be one of fastrank"),
        (["--seconds", "-1"], "--seconds must not be negative"),
        (["--dtype", "int8"], "int8"),
        (["--threads", "0"], "--threads must be at least 1"),
        (["--workloads", "K5"], "workload"),
    ],
)
def test_wrong_commands_get_one_line(arguments: list[str], message: str, capsys, tmp_path):
    assert bench(*arguments, "--output", str(tmp_path / "out")) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("fastrank bench: error: ") and captured.err.count("\n") == 1
    assert message in captured.err
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_a_file_is_refused(tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("kept")
    assert bench("--workload", "K5", *TINY, "--output", str(file)) == 2
    assert file.read_text() == "kept"
