"""Runs with bfloat16 computation, gradient checkpointing and adapters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig
from trainer_runs import assert_same_weights, step_logs

from fastrank.data.group import Group
from fastrank.tasks.menu import tiny_llama
from fastrank.training.config import RankConfig
from fastrank.training.trainer import RankTrainer

Make = Callable[..., Any]
SGD = {"optim": "sgd", "learning_rate": 0.05, "max_steps": 3}


def _logged(trainer: Any, key: str) -> list[float]:
    return [row[key] for row in step_logs(trainer)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, menu_groups: list[Group]) -> RankTrainer:
    """A run to compare with."""
    config = RankConfig(
        output_dir=str(tmp_path_factory.mktemp("plain")), per_device_train_batch_size=8,
        logging_steps=1, save_strategy="no", disable_tqdm=True, **SGD,
    )  # fmt: skip
    trainer = RankTrainer(tiny_llama(0), config, menu_groups, menu_groups[:6])
    trainer.train()
    return trainer


def test_bfloat16_computation_keeps_float32_weights(
    make_trainer: Make, menu_groups: list[Group], plain: Any
) -> None:
    mixed = make_trainer(menu_groups, menu_groups[:6], bf16=True, use_cpu=True, **SGD)
    seen = set()
    mixed.model.model.layers[0].mlp.register_forward_hook(lambda m, a, out: seen.add(out.dtype))
    mixed.train()
    assert seen == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in mixed.model.parameters())
    assert _logged(mixed, "loss") == pytest.approx(_logged(plain, "loss"), rel=0.02)
    assert _logged(mixed, "loss") != _logged(plain, "loss")
    assert mixed.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=0.02)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_run(
    make_trainer: Make, menu_groups: list[Group], plain: Any, reentrant: bool
) -> None:
    checkpointed = make_trainer(
        menu_groups,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
        **SGD,
    )
    calls = []
    layer = checkpointed.model.model.layers[1].input_layernorm
    layer.register_forward_hook(lambda *args: calls.append(torch.is_grad_enabled()))
    checkpointed.train()
    assert len(calls) == 2 * SGD["max_steps"]  # run again in the backward pass
    assert_same_weights(checkpointed, plain, atol=1e-6, rtol=1e-5)


def test_an_adapter_is_trained_saved_and_resumed(tmp_path: Path, menu_groups: list[Group]) -> None:
    def make(name: str, steps: int) -> RankTrainer:
        config = RankConfig(
            output_dir=str(tmp_path / name),
            learning_rate=3e-2,
            per_device_train_batch_size=8,
            max_steps=steps,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_steps=2,
            disable_tqdm=True,
        )
        lora = LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj", "v_proj", "lm_head"])
        return RankTrainer(tiny_llama(0), config, menu_groups, peft_config=lora)

    whole = make("whole", 4)
    assert whole.disabled_dropout
    start = {k: v.clone() for k, v in whole.model.state_dict().items()}
    before = whole.evaluate(menu_groups)["eval_loss"]
    whole.train()
    moved = {k for k, v in whole.model.state_dict().items() if not torch.equal(v, start[k])}
    assert moved and all("lora_" in key for key in moved)
    assert any("lm_head" in key for key in moved)
    assert whole.evaluate(menu_groups)["eval_loss"] < before - 0.01

    make("cut", 2).train()
    resumed = make("cut", 4)
    resumed.train(resume_from_checkpoint=True)
    assert_same_weights(resumed, whole)

    resumed.save_model()
    tiny_llama(0).save_pretrained(tmp_path / "base")
    file = tmp_path / "cut" / "adapter_config.json"
    settings = json.loads(file.read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}
    file.write_text(json.dumps(settings))
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "cut", dtype=torch.float32)
    assert_same_weights(again, whole, atol=1e-5, rtol=1.3e-6)
