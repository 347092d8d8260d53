"""LoRA from the command line to a merged model, and adapters where models are expected."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fastrank.cli.main import main
from fastrank.errors import InputError
from fastrank.modeling.merge import merge_adapter
from fastrank.modeling.pretrained import check_model_path, is_adapter, load_model
from fastrank.training.adapters import lora_config
from fastrank.training.run_options import TrainOptions

INPUT = torch.tensor([[7, 20, 33, 8, 45, 21], [9, 9, 50, 12, 30, 61]])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions whose better answers end in more exclamation marks."""
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    rows = [
        {
            "prompt": f"{a}+{b}=",
            "responses": [f"{a + b}{'!' * k}" for k in range(3)],
            "scores": [0.0, 1.0, 2.0],
        }
        for a in range(4)
        for b in range(6)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def arguments(policy_path: Path, data: Path, folder: Path, **options: Any) -> list[str]:
    given = {
        "model": policy_path, "data": data, "output_dir": folder, "use_peft": "true", "lora_r": 4,
        "learning_rate": 1e-2, "lr_scheduler_type": "constant", "max_steps": 4, "save_steps": 2,
        "logging_steps": 1, "eval_groups": 4,
    } | options  # fmt: skip
    argv = ["train"]
    for name, value in given.items():
        values = value if isinstance(value, list) else [value]
        argv += [f"--{name}", *map(str, values)]
    return argv


@pytest.fixture(scope="module")
def run(policy_path: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "lora"
    targets = ["q_proj", "v_proj", "lm_head"]
    argv = arguments(policy_path, data, folder, lora_target_modules=targets, merge_adapter="true")
    assert main(argv) == 0
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(INPUT).logits
    return found


def test_the_adapter_is_trained_and_the_base_is_not(
    run: Path, policy_path: Path, data: Path
) -> None:
    weights = load_file(run / "adapter_model.safetensors")
    assert {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in weights if ".lora_" in name} == {
        "q_proj", "v_proj", "lm_head",
    }  # fmt: skip
    trained = [value for name, value in weights.items() if "lora_B" in name]
    assert len(trained) == 5 and all(value.abs().max() > 1e-3 for value in trained)
    settings = json.loads((run / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (4, 32)
    assert settings["base_model_name_or_path"] == str(policy_path)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["after"]["train_split"]["loss"] < summary["before"]["train_split"]["loss"] - 0.05


def test_every_way_back_gives_the_same_model(run: Path, policy_path: Path) -> None:
    """PEFT's own loader, transformers', fastrank's, and the merged export without PEFT."""
    expected = logits(AutoPeftModelForCausalLM.from_pretrained(run, dtype=torch.float32))
    assert (expected - logits(load_model(policy_path))).abs().max() > 1e-2
    for folder in (run, run / "merged", run / "checkpoint-4"):
        plain = load_model(folder, torch.float32)
        assert not hasattr(plain, "peft_config")
        torch.testing.assert_close(logits(plain), expected, atol=1e-5, rtol=1e-5)
        own = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        torch.testing.assert_close(logits(own), expected, atol=1e-5, rtol=1e-5)
    assert not is_adapter(run / "merged") and is_adapter(run)
    assert check_model_path(run) == str(policy_path)


def test_other_commands_take_the_adapter_for_a_model(run: Path, data: Path, tmp_path: Path) -> None:
    found = []
    for name, model in (("adapter", run), ("merged", run / "merged")):
        out = tmp_path / f"{name}.jsonl"
        argv = ["score", "--model", str(model), "--data", str(data), "--output", str(out)]
        assert main(argv) == 0
        found.append([json.loads(line) for line in out.read_text().splitlines()])
    assert len(found[0]) == len(found[1]) == 24
    for one, other in zip(*found, strict=True):
        assert one.keys() == other.keys()
        for key in one.keys() - {"prompt", "responses"}:
            assert one[key] == pytest.approx(other[key], abs=1e-4)


@pytest.mark.parametrize("backprop", ["joint", "two_phase"])
def test_a_resumed_run_is_the_same_bit_for_bit(
    run: Path, policy_path: Path, data: Path, tmp_path: Path, backprop: str
) -> None:
    def train(folder: str, **options: Any) -> dict[str, torch.Tensor]:
        targets = ["q_proj", "lm_head"]
        given = {"lora_target_modules": targets, "backprop": backprop} | options
        assert main(arguments(policy_path, data, tmp_path / folder, **given)) == 0
        return load_file(tmp_path / folder / "adapter_model.safetensors")

    whole = train("whole")
    half = train("cut", max_steps=2)
    resumed = train("cut", resume_from_checkpoint="true")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert any(not torch.equal(whole[name], half[name]) for name in whole)


def test_options_become_a_configuration() -> None:
    options = TrainOptions(
        model="m", data="d", use_peft=True, lora_r=3, lora_alpha=5, lora_dropout=0.1,
        lora_target_modules=["all-linear"], lora_modules_to_save=["lm_head"], use_rslora=True,
        use_dora=True, lora_target_parameters=["mlp.experts"],
    )  # fmt: skip
    config = lora_config(options)
    assert config is not None
    assert (config.r, config.lora_alpha, config.lora_dropout) == (3, 5, 0.1)
    assert config.target_modules == "all-linear" and config.target_parameters == ["mlp.experts"]
    assert config.modules_to_save == ["lm_head"] and config.task_type == "CAUSAL_LM"
    assert config.use_rslora and config.use_dora
    assert lora_config(TrainOptions(model="m", data="d")) is None
    named = TrainOptions(model="m", data="d", use_peft=True, lora_target_modules=["q_proj"])
    assert lora_config(named).target_modules == {"q_proj"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_r": 8}, "--lora_r needs --use_peft true"),
        ({"merge_adapter": True}, "--merge_adapter needs --use_peft true"),
        ({"use_peft": True, "lora_r": 0}, "lora_r must be at least 1, got 0"),
        ({"use_peft": True, "lora_dropout": 1.0}, "lora_dropout must be at least 0 and below 1"),
        ({"use_peft": True, "model": None, "data": None}, "--use_peft needs --model and --data"),
    ],
)
def test_options_that_do_not_make_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TrainOptions(**{"model": "m", "data": "d"} | options)


def test_an_adapter_that_does_not_fit_is_one_line(
    policy_path: Path, data: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "none"
    assert main(arguments(policy_path, data, folder, lora_target_modules=["nonsense"])) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert "the adapter does not fit LlamaForCausalLM" in lines[-1] and "nonsense" in lines[-1]
    assert main(arguments(run, data, folder)) == 2
    assert "needs a whole model, got the adapter" in capsys.readouterr().err
    assert not folder.exists()


def test_broken_adapter_folders_are_refused(run: Path, tmp_path: Path) -> None:
    def broken(name: str, **settings: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copyfile(run / file, folder / file)
        config = folder / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | settings))
        return folder

    def refused(folder: Path) -> str:
        with pytest.raises(InputError) as caught:
            load_model(folder)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no such model folder" in refused(broken("base", base_model_name_or_path="./gone"))
    assert "must name base_model_name_or_path" in refused(
        broken("nameless", base_model_name_or_path=None)
    )
    assert "is an adapter too" in refused(broken("chain", base_model_name_or_path=str(run)))
    pickled = broken("pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    assert "has no adapter_model.safetensors" in refused(pickled)
    partial = broken("partial")
    weights = load_file(partial / "adapter_model.safetensors")
    save_file(dict(list(weights.items())[2:]), partial / "adapter_model.safetensors")
    assert "missing adapter keys" in refused(partial)
    garbage = broken("garbage")
    (garbage / "adapter_config.json").write_text("{")
    assert "adapter_config.json cannot be read" in refused(garbage)


KINDS = {
    "attention": {"target_modules": ["q_proj"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["embed_tokens"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"]},
    "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "saved embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 7]},
    "dora": {"target_modules": ["q_proj"], "use_dora": True},
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
def test_merged_is_what_the_adapter_computes(kind: str, tied: bool, tmp_path: Path) -> None:
    """Also after saving and loading, which would tie a separated head again."""
    model = build("llama", vocab_size=62, tie_word_embeddings=tied)
    wrapped = get_peft_model(model, LoraConfig(r=2, **KINDS[kind])).eval()
    before = logits(wrapped)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    expected = logits(wrapped)
    assert not torch.allclose(expected, before, atol=1e-2)
    merged = merge_adapter(wrapped)
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-5)
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(logits(again), expected, atol=1e-5, rtol=1e-5)
