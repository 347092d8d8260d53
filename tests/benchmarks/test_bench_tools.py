"""Timing, memory, workloads and the CSV files."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time

import pytest
import torch

from fastrank.benchmarks import peak_memory
from fastrank.benchmarks.problem import rewards_with_accuracy
from fastrank.benchmarks.results import (
    MISSING,
    WRONG,
    Measurement,
    read_csv,
    text_table,
    verdict,
    write_csv,
)
from fastrank.benchmarks.runner import RunPlan, run_workload
from fastrank.benchmarks.timing import Timing, interleave
from fastrank.benchmarks.workloads import SUITES, WORKLOADS, Workload, choose_workloads, resize

CPU = torch.device("cpu")


def test_variants_take_turns_and_the_order_alternates():
    calls: list[str] = []
    steps = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    timings = interleave(steps, CPU, seconds=0.0, min_rounds=3)
    assert calls == list("abc" + "abc" + "cba" + "abc")
    assert all(len(timing.samples) == 3 for timing in timings.values())


def test_a_sample_is_divided_by_the_runs_in_it():
    def step() -> None:
        time.sleep(0.004)

    timings = interleave(
        {"one": step, "four": step}, CPU, seconds=0.0, inner=2, repeats={"four": 4}
    )
    assert 4.0 <= timings["one"].median < 20.0
    assert timings["four"].median < timings["one"].median / 2


def test_rounds_end_with_the_time_and_at_the_limit():
    def step() -> None:
        time.sleep(0.002)

    assert len(interleave({"a": step}, CPU, seconds=1.0)["a"].samples) > 5
    few = interleave({"a": step}, CPU, seconds=9.0, max_rounds=7)
    assert len(few["a"].samples) == 7


def test_median_and_spread():
    timing = Timing((4.0, 1.0, 2.0, 3.0, 100.0))
    assert timing.median == 3.0
    assert timing.spread == pytest.approx((4.0 - 2.0) / 2 / 3.0)
    assert Timing((5.0,)).spread == 0.0


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux")
def test_peak_memory_is_that_of_the_run():
    size = 64 << 20

    def step() -> dict[str, torch.Tensor]:
        torch.ones(size // 4).sum()  # freed before the end
        return {"kept": torch.ones(size // 4, dtype=torch.uint8)}

    assert peak_memory.cpu_peak(step) == pytest.approx(size, rel=0.1)


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux")
def test_peak_memory_in_a_process_of_its_own():
    """Plain PyTorch holds the logits and their gradients; fastrank some groups of them."""
    sizes = {"groups": 16, "candidates": 4, "response": 16, "vocab": 8192, "hidden": 16}
    workload = resize(WORKLOADS["K5"], **sizes)
    logits = workload.tokens * workload.vocab * 4
    make, sizes = "fastrank.benchmarks.problem:make_step", dataclasses.asdict(workload)
    plain, fused = (
        peak_memory.fresh_process_peak(make, workload=sizes, variant=variant)
        for variant in ("plain PyTorch", "fastrank")
    )
    assert plain is not None and fused is not None
    assert 1.9 * logits < plain < 4 * logits
    assert 0 < fused < plain / 1.5


def test_saved_activations_leave_parameters_out():
    weight = torch.randn(64, 64, requires_grad=True)
    x = torch.randn(32, 64)

    def step() -> None:
        y = x @ weight  # keeps x (and weight)
        torch.exp(y).sum().backward()  # keeps its result

    assert peak_memory.saved_for_backward(step, [weight]) == 2 * 32 * 64 * 4


def test_the_workloads_of_the_design():
    assert WORKLOADS["K1"].tokens == WORKLOADS["K2"].tokens == 8192
    assert WORKLOADS["K3"].tokens == 6144
    assert WORKLOADS["K4"].tokens == 16384
    assert WORKLOADS["K5"].tokens == WORKLOADS["K5-bf16"].tokens == 2048
    assert WORKLOADS["K2"].frozen_head and not WORKLOADS["K1"].frozen_head
    assert [w.name for w in choose_workloads("loss", "cuda")] == [
        "K1", "K2", "K3", "K4", "K1-85", "K1-autocast", "K3-softcap", "K4-odd",
    ]  # fmt: skip
    assert [WORKLOADS[f"K{i}"].vocab for i in range(1, 5)] == [128256, 128256, 32000, 151936]
    assert [w.name for w in choose_workloads("step", "cpu")] == ["S2", "S2-1024", "S2-256"]
    assert {w.suite for w in WORKLOADS.values()} == set(SUITES)


def test_a_workload_survives_the_way_to_another_process():
    for workload in WORKLOADS.values():
        fields = json.loads(json.dumps(dataclasses.asdict(workload)))
        assert Workload.from_json(fields) == workload


def test_sizes_can_be_replaced():
    workload = resize(WORKLOADS["K5"], tokens=1024, vocab=77, candidates=None)
    assert (workload.groups, workload.tokens, workload.vocab) == (2, 1024, 77)


@pytest.mark.parametrize("accuracy", [0.0, 0.15, 0.5, 0.85, 1.0])
def test_rewards_have_the_accuracy_asked_for(accuracy: float):
    generator = torch.Generator().manual_seed(0)
    strength = torch.rand(200, 6, generator=generator)
    rewards = rewards_with_accuracy(strength, accuracy, generator)
    assert torch.equal(rewards.sort(1).values, torch.arange(6.0).expand(200, 6))
    upper = torch.triu(torch.ones(6, 6, dtype=torch.bool), 1)
    same = (rewards[:, :, None] > rewards[:, None, :]) == (
        strength[:, :, None] > strength[:, None, :]
    )
    assert same[:, upper].float().mean().item() == pytest.approx(accuracy, abs=0.03)


def test_the_csv_gives_back_its_rows(tmp_path, a_row):
    rows = [
        a_row(median_ms=1.5, spread=0.25, ratio=2.0, error=1e-7, samples_ms="1 2", ours=True),
        a_row(status=MISSING, reason='needs "x", and\nmore'),
    ]
    path = tmp_path / "loss_cpu.csv"
    write_csv(rows, path, {"note": "in every row"})
    assert read_csv(path, Measurement) == rows
    assert path.read_text().count("in every row") == 2
    older = path.read_text().replace("queued_ms", "of_old")  # recorded before a column came
    path.write_text(older)
    assert read_csv(path, Measurement) == rows
    assert not list(tmp_path.glob("*.partial"))


def test_the_table_leaves_empty_columns_out(a_row):
    lines = text_table([a_row(median_ms=123.4, spread=0.1, ratio=1.0, error=1e-7)]).splitlines()
    assert lines[1].split() == "variant ms spread time / fastrank's error".split()
    assert lines[2].split() == ["v", "123", "10%", "1.00", "1e-07"]


def test_one_sentence_says_whether_it_is_faster(a_row):
    own = a_row(variant="fastrank", ours=True, median_ms=800.0, peak_mib=190.0)
    plain = a_row(variant="plain PyTorch", median_ms=1200.0, peak_mib=760.0)
    peers = [a_row(variant=name, median_ms=ms) for name, ms in (("slow", 9e3), ("quick", 700.0))]
    assert verdict([own, plain]) == (
        "fastrank takes 800 ms, plain PyTorch 1.20 s: 1.50 times faster; "
        "memory 190 against 760 MiB: 4.00 times less."
    )
    assert verdict([*peers, own, plain]).endswith(
        "; of the others quick is the fastest with 700 ms."
    )
    plain.median_ms, plain.peak_mib = 640.0, None
    assert verdict([own, plain]).endswith("plain PyTorch 640 ms: 1.25 times slower.")
    plain.median_ms = 810.0
    assert verdict([own, plain]).endswith("plain PyTorch 810 ms: about the same.")
    assert verdict([own]) is None and verdict([plain, *peers]) is None
    own.status = WRONG
    assert verdict([own, plain]) is None


def test_every_row_says_where_it_was_measured():
    workload = dataclasses.replace(WORKLOADS["R1-64x8"], groups=2, candidates=2)
    (row,) = run_workload(workload, CPU, RunPlan(seconds=0.0, only=["plain PyTorch"]))
    assert row.device_name and "torch=" in row.versions and len(row.date) == 16
    assert row.ratio is None  # fastrank did not run: nothing to compare with
    assert row.median_ms is not None and math.isfinite(row.median_ms)
