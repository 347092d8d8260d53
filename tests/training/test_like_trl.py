"""What somebody who knows TRL types: metrics, callbacks, QLoRA, options; and the model card."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from huggingface_hub import ModelCard
from pack_cases import (
    assert_same_gradients,
    one_pack,
    random_groups,
    separate_loss,
    take_gradients,
)
from peft import LoraConfig, get_peft_model
from tiny_models import save_llama
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    EarlyStoppingCallback,
    TrainingArguments,
)

import fastrank
from fastrank.cli.main import main
from fastrank.errors import InputError
from fastrank.modeling.prepare import head_path_of
from fastrank.modeling.pretrained import load_model

ROWS = [
    {"prompt": f"q{i} ", "responses": ["a" * (i + 1), "b", "c c"], "scores": [i, 1.5, 0.25]}
    for i in range(8)
]
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def config(folder: Path, **options: Any) -> fastrank.RankConfig:
    given = {"max_steps": 4, "logging_steps": 1, "learning_rate": 1e-2, "save_steps": 2} | options
    return fastrank.RankConfig(output_dir=str(folder), use_cpu=True, disable_tqdm=True, **given)


def test_metrics_and_callbacks_of_ones_own(policy_path: Path, tmp_path: Path) -> None:
    seen: list[Any] = []

    def best_reward(found: Any) -> dict[str, float]:
        """Reward of the candidate that the model ranks first."""
        seen.append(found)
        pairs = zip(found.predictions, found.label_ids, strict=True)
        return {"best_reward": float(np.mean([r[s.argmax()] for s, r in pairs]))}

    options = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "best_reward"}
    stop = EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=1e9)
    trainer = fastrank.RankTrainer(
        policy_path,
        config(tmp_path, **options, greater_is_better=True, save_strategy="no", max_steps=9),
        ROWS,
        ROWS[2:5],
        compute_metrics=best_reward,
        callbacks=[stop],
    )
    trainer.train()
    assert trainer.state.global_step == 2  # the first value cannot be beaten by that much
    values = trainer.evaluate()
    (found,) = seen[-1:]
    groups, model = trainer.eval_dataset, trainer.model
    for own, scores in zip(found.predictions, fastrank.score(model, groups), strict=True):
        np.testing.assert_allclose(own, scores, atol=1e-6)
    assert [own.tolist() for own in found.label_ids] == [row["scores"] for row in ROWS[2:5]]
    expected = np.mean(
        [g.rewards[s.argmax()] for g, s in zip(groups, found.predictions, strict=True)]
    )
    assert values["eval_best_reward"] == pytest.approx(expected)
    assert "eval_rank_loss" in values
    assert any("eval_best_reward" in row for row in trainer.state.log_history)


@pytest.mark.parametrize("kind", ["arguments", "quantized", "twice"])
def test_what_cannot_be_trained_is_refused_in_a_sentence(kind, policy_path, tmp_path) -> None:
    args: Any = config(tmp_path)
    model, more = AutoModelForCausalLM.from_pretrained(policy_path), {}
    if kind == "arguments":
        args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
        message = "args must be a fastrank.RankConfig, got TrainingArguments: RankConfig takes"
    elif kind == "quantized":
        model.hf_quantizer = SimpleNamespace(is_qat_trainable=False)
        message = "a quantised model needs a peft_config, because its weights cannot be trained"
    else:
        more = {"quantization_config": object(), "peft_config": LoraConfig(**LORA)}
        message = "quantization_config needs the name or folder of a model, got a loaded one"
    with pytest.raises(InputError, match=message):
        fastrank.RankTrainer(model, args, random_groups(), **more)


# ---- QLoRA -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose layers are as wide as a block of 4-bit numbers."""
    pytest.importorskip("bitsandbytes")
    return save_llama(tmp_path_factory.mktemp("wide"), hidden_size=64, intermediate_size=128)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_model_keeps_its_head_and_is_exact(bits, dtype, wide_path) -> None:
    wanted = BitsAndBytesConfig(
        load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_compute_dtype=dtype
    )
    model = load_model(wide_path, dtype, quantization_config=wanted, device_map={"": "cpu"})
    assert f"Linear{bits}bit" in type(model.model.layers[0].mlp.up_proj).__name__
    model = get_peft_model(model, LoraConfig(**LORA)).train()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    groups = random_groups(vocab=60)
    expected = separate_loss(model, groups, fastrank.RRHF())
    expected.backward()
    reference = take_gradients(model)
    assert len(reference) == 8 and all(g.any() for g in reference.values())
    fastrank.prepare_model(model)
    out = model(pack=one_pack(groups), loss=fastrank.RRHF())
    out.loss.backward()
    assert head_path_of(model).fused
    assert model.get_output_embeddings().weight.dtype == dtype
    # 8-bit products round activations on a scale of the rows that are multiplied together.
    close = 0.1 if dtype == torch.bfloat16 or bits == 8 else 1e-5
    torch.testing.assert_close(
        out.loss, expected.detach().to(out.loss.dtype), rtol=close, atol=close
    )
    assert_same_gradients(take_gradients(model), reference, 2 * close)


@pytest.mark.filterwarnings("ignore")
def test_repacked_4_bit_weights_are_not_trained(wide_path) -> None:
    wanted = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    model = load_model(wide_path, quantization_config=wanted, device_map={"": "cpu"})
    if not model.model.layers[0].mlp.up_proj.support_avx512bf16_for_cpu:
        pytest.skip("bitsandbytes repacks weights where a CPU multiplies bfloat16")
    with torch.no_grad():
        model.eval()(torch.tensor([[5, 6, 7]]))
    model.requires_grad_(False)
    assert fastrank.score(model, random_groups(vocab=60))[0].shape == (3,)  # nothing is trained
    model = get_peft_model(model, LoraConfig(**LORA))
    with pytest.raises(InputError, match="4-bit weight of model.layers.0.* load the model anew"):
        fastrank.prepare_model(model)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_qlora_run_from_the_command_line(wide_path, write_rows, tmp_path, capsys) -> None:
    argv = [
        *("train", "--model_name_or_path", str(wide_path)),
        *("--dataset_name", str(write_rows(ROWS))),
        *("--load_in_4bit", "--use_peft", "--lora_r", "2", "--loss", "dpo", "--use_cpu", "true"),
        *("--max_steps", "2", "--logging_steps", "1", "--learning_rate", "1e-2"),
        *("--cache_dir", str(tmp_path / "cache"), "--output_dir", str(tmp_path / "run")),
        *("--merge_adapter", "true", "--json"),
    ]  # fmt: skip
    assert main(argv) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    start = next(row for row in rows if row["step"] == 0 and "eval_loss" in row)
    # The reference is the quantised model itself, so nothing has moved before the first step.
    assert start["eval_rewards/margins"] == 0.0
    pairs = 3  # of three candidates without a tie
    assert start["eval_loss"] == pytest.approx(pairs * math.log(2), rel=1e-6)
    assert rows[-1]["train_split_rewards/margins"] != 0.0
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged")
    assert merged.dtype == torch.float32 and not hasattr(merged, "hf_quantizer")
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert card.data.library_name == "peft"
    assert ModelCard.load(tmp_path / "run" / "merged" / "README.md").data.library_name == (
        "transformers"
    )
    assert main([*argv[:5], "--load_in_4bit", "--output_dir", str(tmp_path / "none")]) == 2
    assert "--load_in_4bit needs --use_peft true" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


# ---- option names ----------------------------------------------------------------------------


def test_a_data_set_by_trl_s_names(policy_path: Path, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "set"
    DatasetDict(
        {"left": Dataset.from_list(ROWS[:5]), "right": Dataset.from_list(ROWS[5:])}
    ).save_to_disk(folder)
    common = ["train", "--use_cpu", "true", "--max_steps", "1", "--cache_dir", str(tmp_path / "c")]
    names = ["--model-name-or-path", str(policy_path), "--dataset_name", str(folder)]
    splits = ["--dataset_train_split", "left", "--dataset_test_split", "right"]
    out = ["--output_dir", str(tmp_path / "run"), "--json"]
    assert main([*common, *names, *splits, *out]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["train_prompts"], result["heldout_prompts"]) == (5, 3)
    yaml = tmp_path / "run.yaml"
    yaml.write_text(
        f"model_name_or_path: {policy_path}\ndataset_name: {folder}\ndataset_train_split: right\n"
    )
    assert (
        main([*common, "--config", str(yaml), "--output_dir", str(tmp_path / "y"), "--json"]) == 0
    )
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["data"][0]["records"]["read"] == 3
    for given, message in (
        (["--dataset_train_split", "up"], "no split 'up'; it has left, right"),
        (["--dataset_name", "rows.jsonl:a:b", "--dataset_config", "x"], "--dataset_config needs"),
        (["--fp16", "true"], "leave it out; a GPU without bfloat16 then computes in float32"),
    ):
        assert main([*common, *names, *given, "--output_dir", str(tmp_path / "no")]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not (tmp_path / "no").exists()


# ---- the model card --------------------------------------------------------------------------


def test_every_saved_model_has_a_card(policy_path: Path, tmp_path: Path) -> None:
    trainer = fastrank.RankTrainer(
        policy_path, config(tmp_path / "run", loss="pro"), ROWS, eval_dataset=ROWS[:2]
    )
    trainer.train()
    trainer.save_model()
    early = ModelCard.load(tmp_path / "run" / "checkpoint-2" / "README.md")
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert "- steps: 2 of 4 prompts" in early.text and "- steps: 4 of 4 prompts" in card.text
    assert card.data.tags == ["fastrank", "ranking", "pro"]
    assert card.data.base_model is None  # a folder is no name on the Hub
    assert f"{policy_path.name}, ranked" in card.text and str(policy_path) not in card.text
    assert "loss: `PRO()`" in card.text and "learning_rate: 0.01" in card.text
    assert "records     8 read, 8 kept" in card.text and "records     2 read" in card.text
    value = trainer.evaluate()["eval_rank_loss"]
    line = next(row for row in card.text.splitlines() if row.startswith("rank_loss"))
    assert f"{value:.4f}" in line
    assert f"- fastrank {fastrank.__version__}" in card.text and "- torch" in card.text
    trainer.create_model_card()
    assert (
        (tmp_path / "run" / "README.md").read_text().endswith("<!-- model card by fastrank -->\n")
    )
    # A file that was there before is somebody else's.
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "README.md").write_text("Mine.")
    trainer.save_model(str(tmp_path / "own"))
    assert (tmp_path / "own" / "README.md").read_text() == "Mine."
    assert (tmp_path / "own" / "model.safetensors").is_file()


def test_a_template_of_ones_own(policy_path: Path, tmp_path: Path) -> None:
    template = tmp_path / "card.jinja"
    template.write_text("---\n{{ card_data }}\n---\n{{ base }} by {{ loss }}: {{ steps }}")
    given = {"model_card_template": str(template), "max_steps": 1, "save_strategy": "no"}
    trainer = fastrank.RankTrainer(policy_path, config(tmp_path / "run", **given), ROWS)
    trainer.train()
    trainer.save_model()
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert card.text.splitlines()[0].strip() == f"{policy_path.name} by RRHF(): 1"
    for text, message in (
        ("{% if %}", "model_card_template .*Expected an expression"),
        (None, "No"),
    ):
        template.unlink() if text is None else template.write_text(text)
        with pytest.raises(InputError, match=message):
            fastrank.RankTrainer(policy_path, config(tmp_path / "run", **given), ROWS)
