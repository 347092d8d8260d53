"""A tensor-parallel model trains as a whole one does, alone and beside data parallelism.

Two and four processes over gloo run `tests/support/tensor_parallel.py`, in float64.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tensor_parallel as worker
import torch
from pack_cases import tied_groups
from torch import nn
from torchrun import filled_once, torchrun
from transformers import AutoModelForCausalLM

from fastrank.errors import InputError
from fastrank.modeling.prepare import prepare_model
from fastrank.tasks.menu import tiny_llama
from fastrank.training import inputs
from fastrank.training.config import RankConfig
from fastrank.training.engine import AccelerateEngine
from fastrank.training.trainer import RankTrainer

LAYOUTS = {"tensor": (2, 2), "data and tensor": (4, 2)}  # processes, and those of one replica
CASES = [
    pytest.param(layout, case, marks=[pytest.mark.slow] if layout != "tensor" else [])
    for layout in LAYOUTS
    for case in worker.CASES
]


@pytest.fixture
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """From a layout to the folder with its results; its cases share their processes."""

    def find(layout: str) -> Path:
        processes, parts = LAYOUTS[layout]

        def fill(folder: Path) -> None:
            worker.make_model().save_pretrained(folder / "model")
            script = str(Path(worker.__file__))
            torchrun(processes, script, str(folder), str(parts), *worker.CASES)

        return filled_once(tmp_path_factory, f"tensor_parallel-{layout}", fill)

    return find


@pytest.fixture
def expected(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """From a case to what one process finds."""

    def load(case: str) -> Any:
        def fill(folder: Path) -> None:
            worker.make_model().save_pretrained(folder / "model")
            torch.save(worker.run_case(folder, case), folder / "result.pt")

        folder = filled_once(tmp_path_factory, f"tensor_parallel-whole-{case}", fill)
        return torch.load(folder / "result.pt", weights_only=True)

    return load


@pytest.mark.parametrize(("layout", "case"), CASES)
def test_training_is_that_of_one_process(run: Any, expected: Any, layout: str, case: str) -> None:
    folder, want = run(layout), expected(case)
    start = dict(worker.make_model().named_parameters())
    assert not want["sharded"]
    processes, parts = LAYOUTS[layout]
    for rank in range(processes):
        got = torch.load(folder / f"{case}-{rank}.pt", weights_only=True)
        # Also for whoever asks about the model alone, as `two_phase_backward` does.
        assert got["shares"] == [(rank // parts, processes // parts)] * 2
        assert got["path"] == want["path"] == "fused: the head reproduces the model's logits"
        assert got["sharded"] and got["bad"] == want["bad"] == ["lm_head.weight"]
        assert got["weights"].keys() == want["weights"].keys() == start.keys()
        for key, weight in want["weights"].items():
            assert float((got["weights"][key] - weight).abs().max()) < 1e-12, key
            assert float((weight - start[key].detach()).abs().max()) > 1e-4, key
        for row, row_wanted in zip(got["log"], want["log"], strict=True):
            for key in ("loss", "rank_loss", "grad_norm", "rewards/accuracies", "live_fraction"):
                assert row[key] == pytest.approx(row_wanted[key], rel=1e-6), key
        for key in ("eval_loss", "eval_rank/kendall_tau"):
            assert got["evaluation"][key] == pytest.approx(want["evaluation"][key], rel=1e-6), key
        if case != "two_phase":  # which counts no prompt twice, but fewer packs share one
            assert got["tokens"] == want["tokens"]


@pytest.mark.parametrize(("layout", "case"), CASES)
def test_what_is_saved_loads_with_transformers(run: Any, layout: str, case: str) -> None:
    folder = run(layout)
    weights = torch.load(folder / f"{case}-0.pt", weights_only=True)["weights"]
    loaded = AutoModelForCausalLM.from_pretrained(folder / f"saved-{case}", dtype=torch.float64)
    found = dict(loaded.named_parameters())
    assert found.keys() == weights.keys()
    for key, weight in weights.items():
        assert torch.equal(found[key], weight), key


def test_a_model_on_several_devices_is_refused() -> None:
    model = tiny_llama(0)
    model.hf_device_map = {"model": 0, "lm_head": "cpu"}
    with pytest.raises(InputError, match="spread over cpu, cuda:0 by its device_map"):
        prepare_model(model)
    model.hf_device_map = {"": "cpu"}
    prepare_model(model)
    model.config.distributed_config = SimpleNamespace(pp_size=2)
    with pytest.raises(InputError, match="cut into 2 pipeline stages"):
        prepare_model(model)


def test_an_adapter_on_a_model_sharded_at_loading_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One process has none: it is told that this one is."""
    monkeypatch.setattr(inputs, "is_sharded", lambda model: True)
    adapter: Any = object()
    with pytest.raises(InputError, match="takes no adapter, got one"):
        RankTrainer(
            tiny_llama(0), RankConfig(use_cpu=True), tied_groups(11, 6), peft_config=adapter
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tp_size": 2}, "has tp_size=2, but the model is whole"),
        ({"cp_size": 2}, "expected cp_size=1, got 2"),
        ({"sp_size": 4}, "expected sp_size=1, got 4"),
        ({"deepspeed": {"tensor_parallel": {"autotp_size": 2}}}, "DeepSpeed's tensor_parallel"),
    ],
)
def test_what_packs_cannot_follow_is_refused(settings: dict[str, Any], message: str) -> None:
    sizes = {"tp_size": 1, "cp_size": 1, "sp_size": 1} | settings
    deepspeed = sizes.pop("deepspeed", None)
    plugin = None if deepspeed is None else SimpleNamespace(deepspeed_config=deepspeed)
    accelerator: Any = SimpleNamespace(
        parallelism_config=SimpleNamespace(**sizes),
        state=SimpleNamespace(deepspeed_plugin=plugin),
        num_processes=2,
    )
    with pytest.raises(InputError, match=message):
        AccelerateEngine(accelerator, nn.Linear(2, 2))
