"""What a call costs on a GPU, by count: another pass, a copy or a wait does not come unseen."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu_counts.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_counts", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_counts"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def counts(script) -> dict[tuple[str, str], object]:
    return {(row.workload, row.way): row for row in script.all_counts()}


@pytest.mark.parametrize("workload", ["K1", "K2", "K3", "K4"])
def test_logits_are_read_once_and_their_gradient_is_written_once(counts, workload) -> None:
    """4 bytes and 2, and what is made of hidden rows: less than a byte where the vocabulary is
    large beside their width."""
    one, two = counts[workload, "one pass"], counts[workload, "two passes"]
    assert one.strategy == two.strategy == "group" and one.chunks == 1
    assert (round(two.read), round(two.written)) == (8, 2)
    assert 4 <= one.read < 4.8 and 2 <= one.written < 2.6
    assert one.read + one.written < 0.75 * (two.read + two.written)
    frozen = workload == "K2"
    assert one.products == (2 if frozen else 3)
    assert one.names.count("unit_dlogits_kernel") == 1 and "row_stats_kernel" not in one.names
    assert one.names.count("rank_kernel") == one.chunks
    assert one.kernels + one.operations <= 10


def test_nothing_waits_for_the_device(counts) -> None:
    assert all(row.waits == 0 for row in counts.values())
    fused = [row for row in counts.values() if row.workload.startswith("K")]
    assert len(fused) >= 12 and all(row.uploads == 0 for row in fused)


def test_attention_takes_as_many_launches_whatever_the_pack(counts) -> None:
    """Each layer's keys are read in place; four index tables go to the device once per pack."""
    rows = [row for (name, _), row in counts.items() if name.startswith("A1")]
    assert len(rows) == 3 and len({row.operations for row in rows}) == 1
    assert rows[0].operations <= 21 and rows[0].kernels == 0
    assert all(row.uploads <= 4 for row in rows)
    assert all(row.read + row.written < 56 for row in rows)


def test_a_model_takes_as_many_launches_whatever_the_candidates(script, counts) -> None:
    """24 layers, forward and backward; tables are uploaded for the first layer alone."""
    whole = counts["S1-qwen", "model"]
    few = script.count_model(
        script.replace(script.WORKLOADS["S1-qwen"], candidates=2, response=3, prompt=5)
    )
    assert (whole.operations, whole.products) == (few.operations, few.products)
    assert whole.uploads == few.uploads <= 4 and whole.products == 24 * 7 * 3
    assert counts["S1-qwen", "one pass"].products == 3  # of the head


def test_a_backward_of_kept_log_probabilities_is_products_alone(counts) -> None:
    for workload in ("K1", "K3", "K4"):
        row = counts[workload, "log-probabilities"]
        assert row.strategy == "keep" and row.products == 3
        assert row.names.count("unit_dlogits_kernel") == row.kernels == 1
        assert row.read + row.written < 7.4


def test_a_float32_head_is_read_once_per_step_and_its_gradient_written_once(counts, script) -> None:
    """Beside a bfloat16 head: 4 bytes read and 2 written per weight to cast it, for the first pack
    alone, and 2 more where the product writes its gradient."""
    plain = counts["K1", "one pass"]
    first, then = (counts["K1-autocast", way] for way in ("one pass", script.NEXT_PACK))
    per_logit = script.WORKLOADS["K1"].hidden / script.WORKLOADS["K1"].tokens
    near = lambda value: pytest.approx(value, abs=2e-3)  # noqa: E731
    assert first.read - plain.read == near(4 * per_logit)
    assert first.written - plain.written == near(2 * per_logit)
    assert (then.read, then.written) == (plain.read, plain.written)
    for row in (first, then):
        assert row.products_written - plain.products_written == near(2 * per_logit)
    assert (first.operations, then.operations) == (plain.operations + 1, plain.operations)


def test_a_pass_too_many_is_counted(script, monkeypatch) -> None:
    """The recorder sees what it is there for: one more operation over a matrix of logits' size."""
    make = script.linear.Logits.make
    monkeypatch.setattr(script.linear.Logits, "make", lambda *args: make(*args).mul_(2))
    row = script.count(script.WORKLOADS["K4"], "one pass")
    assert row.read >= 8 and row.written >= 6


def test_a_wait_is_counted(script) -> None:
    counts = script.Counts("", "")
    with script.FakeTensorMode(), script.Recorder(counts):
        on_device = script.torch.empty(4, device="cuda")
        script.torch.ops.aten._to_copy(on_device, device="cpu")
    assert counts.waits == 1
