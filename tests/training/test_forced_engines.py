"""accelerate's own FSDP2, ZeRO-2 and ZeRO-3 train as one process does, in float32 where it counts.

Two processes over gloo run the code that users run (`tests/support/forced_engines.py`).
"""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import forced_engines as worker
import pytest
import torch
from torchrun import filled_once, torchrun
from transformers import AutoModelForCausalLM

QUICK = ["fsdp2-float32-untied-joint", "fsdp2-bf16-tied-two_phase"]
without_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)


def _parameters(names: list[str]) -> list[Any]:
    return [
        pytest.param(
            name,
            marks=[
                *([] if name in QUICK else [pytest.mark.slow]),
                *([without_deepspeed] if name.startswith("zero") else []),
            ],
        )
        for name in names
    ]


@pytest.fixture
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """From a case to the folder with its results; the cases of an engine share their processes."""

    def find(name: str) -> Path:
        if name in QUICK:
            names, title = QUICK, "quick"
        else:
            title = name.partition("-")[0]
            names = [n for n in worker.CASES if n.startswith(f"{title}-") and n not in QUICK]

        def fill(folder: Path) -> None:
            torchrun(2, str(Path(worker.__file__)), str(folder), *names)

        return filled_once(tmp_path_factory, f"forced_engines-{title}", fill)

    return find


@pytest.fixture
def found(run: Any) -> Any:
    """From a case to what each process found."""

    def load(name: str) -> list[Any]:
        return [torch.load(run(name) / f"{name}-{rank}.pt", weights_only=True) for rank in (0, 1)]

    return load


@pytest.fixture
def expected(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """From a case to what one process finds in float32, without an engine."""

    def load(name: str) -> Any:
        case = dataclasses.replace(worker.CASES[name], engine="plain", bf16=False)
        torch.set_num_threads(1)
        folder = filled_once(
            tmp_path_factory,
            case.name,
            lambda folder: torch.save(worker.run_case(folder, case, 1), folder / "result.pt"),
        )
        return torch.load(folder / "result.pt", weights_only=True)

    return load


def test_the_rewards_are_all_equal_in_bfloat16() -> None:
    """So that a cast on the way to the loss shows: no pair would be left, and no ranking loss."""
    groups = worker.close_groups()
    assert any(len(set(group.rewards.tolist())) > 2 for group in groups)
    assert all(len(set(group.rewards.bfloat16().tolist())) == 1 for group in groups)


@pytest.mark.parametrize("name", _parameters(list(worker.CASES)))
def test_every_pack_is_fused_and_every_result_float32(found: Any, name: str) -> None:
    case = worker.CASES[name]
    for got in found(name):
        assert got["engine"] == case.engine
        assert got["looks_first"] == (not name.startswith("zero"))
        assert got["paths"].keys() == {"fused"} and got["paths"]["fused"] > worker.STEPS
        assert got["dtypes"].keys() == {"torch.float32"}
        assert got["reduced"].keys() == {"torch.float32"}


@pytest.mark.parametrize("name", _parameters(list(worker.CASES)))
def test_a_bad_weight_on_one_process_is_seen_by_all(found: Any, name: str) -> None:
    head = "model.embed_tokens.weight" if worker.CASES[name].tied else "lm_head.weight"
    assert [got["bad"] for got in found(name)] == [[head], [head]]
    if name.startswith("zero"):  # its step is taken before a loss can be refused
        assert all("nonfinite=skip is not possible" in got["refusal"] for got in found(name))


@pytest.mark.parametrize("name", _parameters(list(worker.CASES)))
def test_no_process_holds_all_gradients(found: Any, name: str) -> None:
    """After each pack a process holds its share, and the head's gradient at most besides; FSDP2
    gathers the head's unit once per step and scatters its gradient once."""
    case = worker.CASES[name]
    for got in found(name):
        weights = got["weights"]
        numbers = sum(weight.numel() for weight in weights.values())
        # A process's share of every weight is padded to a multiple of its number.
        padding = sum(weight.numel() // len(weight) + 16 for weight in weights.values())
        head = weights["model.embed_tokens.weight" if case.tied else "lm_head.weight"].numel()
        most = 4 * (numbers / 2 + padding + head)
        if case.engine == "zero2":  # keeps a weight whole that its cut divides
            most += 4 * max(weight.numel() for weight in weights.values())
        assert most < 4 * numbers
        passes = [step["held"] for step in got["steps"]]
        assert len(passes) == worker.STEPS and max(map(len, passes)) >= 3
        assert 0 < max(map(max, passes)) <= most
        if case.engine == "fsdp2":
            after_evaluation = got["steps"][2:3]
            for step in got["steps"]:
                # An evaluation before has gathered it, with the same weights.
                assert step["gathers"].get(got["head_unit"], 0) == (step not in after_evaluation)
                assert step["scatters"][got["head_unit"]] == 1
                # Other units' gradients travel with every pack.
                assert max(step["scatters"].values()) >= len(step["held"])


@pytest.mark.parametrize("name", _parameters([n for n in worker.CASES if "float32" in n]))
def test_float32_training_is_that_of_one_process(found: Any, expected: Any, name: str) -> None:
    want = expected(name)
    start = dict(worker.make_model(worker.CASES[name].tied).named_parameters())
    for got in found(name):
        assert got["weights"].keys() == want["weights"].keys() == start.keys()
        for key, weight in want["weights"].items():
            assert float((got["weights"][key] - weight).abs().max()) < 2e-6, key
            assert float((weight - start[key]).abs().max()) > 1e-3, key
        for key in ("loss", "rank_loss", "grad_norm"):
            values = [row[key] for row in got["log"]]
            assert values == pytest.approx([row[key] for row in want["log"]], rel=2e-5), key
        assert got["evaluation"]["eval_loss"] == pytest.approx(
            want["evaluation"]["eval_loss"], rel=2e-5
        )


@pytest.mark.parametrize("name", _parameters([n for n in worker.CASES if "bf16" in n]))
def test_bfloat16_training_ranks_as_float32_does(found: Any, expected: Any, name: str) -> None:
    want = expected(name)
    for got in found(name):
        assert len(got["log"]) == worker.STEPS
        for row, row_wanted in zip(got["log"], want["log"], strict=True):
            assert row["rank_loss"] == pytest.approx(row_wanted["rank_loss"], rel=0.1)
            assert row["rank_loss"] > 0
            for key in ("loss", "grad_norm"):
                assert row[key] == pytest.approx(row_wanted[key], rel=0.01), key
        for key in ("rewards/accuracies", "rank/top1"):
            assert got["log"][0][key] == pytest.approx(want["log"][0][key], abs=0.03), key


@pytest.mark.parametrize("name", _parameters(list(worker.CASES)))
def test_what_is_saved_loads_with_transformers(run: Any, found: Any, name: str) -> None:
    one, other = found(name)
    saved = run(name) / f"saved-{name}"
    loaded = dict(AutoModelForCausalLM.from_pretrained(saved).named_parameters())
    assert loaded.keys() == one["weights"].keys()
    for key, weight in one["weights"].items():
        assert torch.equal(weight, other["weights"][key]), key
        assert torch.equal(loaded[key], weight), key
