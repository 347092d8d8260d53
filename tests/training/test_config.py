"""RankConfig: safe defaults, and one line for what is wrong."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastrank.errors import InputError
from fastrank.losses import PRO, RRHF
from fastrank.training.config import RankConfig
from fastrank.training.early_checks import check_best_metric


def _config(**options: object) -> RankConfig:
    return RankConfig(**({"output_dir": "unused"} | options))  # type: ignore[arg-type]


def test_defaults_that_differ_from_transformers() -> None:
    config = _config()
    assert config.logging_nan_inf_filter is False
    assert config.remove_unused_columns is False
    assert config.ddp_find_unused_parameters is False
    assert config.report_to == []
    assert config.ranking_loss == RRHF()
    assert config.weights_dtype == torch.float32


def test_the_loss_and_its_options() -> None:
    config = _config(loss="rrhf", loss_kwargs='{"margin": 0.25}')
    assert config.ranking_loss == RRHF(margin=0.25)
    assert _config(loss="pro", loss_kwargs={"sft_weight": 0.1}).ranking_loss == PRO(sft_weight=0.1)


def test_groups_per_step_counts_accumulation() -> None:
    config = _config(per_device_train_batch_size=6, gradient_accumulation_steps=3)
    assert config.groups_over(1) == 18 and config.groups_over(4) == 72
    config = _config(per_device_train_batch_size=6, groups_per_step=7)
    assert config.groups_over(1) == config.groups_over(4) == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "rrfh"}, "did you mean 'rrhf'"),
        ({"loss_kwargs": '{"margn": 1}'}, "did you mean 'margin'"),
        ({"loss_kwargs": "{margin: 1}"}, "loss_kwargs must be JSON"),
        ({"loss_kwargs": "[1]"}, "loss_kwargs must be a JSON object"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"max_length": 1}, "max_length must be at least 2, got 1"),
        ({"max_response_length": 0}, "max_response_length must be at least 1, got 0"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1"),
        ({"groups_per_step": 0}, "groups_per_step must be at least 1, got 0"),
        (
            {"groups_per_step": 8, "gradient_accumulation_steps": 2},
            "expected no gradient_accumulation_steps beside it, got 2",
        ),
        ({"nonfinite": "ignore"}, "nonfinite must be one of stop, skip, got 'ignore'"),
        ({"dtype": "float8"}, "dtype must be one of auto, float32, bfloat16, got 'float8'"),
        ({"fp16": True}, "fp16 is not supported"),
        ({"normalize": -1.0}, "RRHF: normalize must be 'mean', 'sum' or a number >= 0, got -1.0"),
        ({"normalize": 0.5, "loss_kwargs": {"normalize": 1}}, "must not both set normalize"),
        ({"logging_nan_inf_filter": True}, "logging_nan_inf_filter must be False"),
        ({"auto_find_batch_size": True}, "use auto_find_pack_size"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"lr_scheduler_type": "lineal"}, "lineal is not a valid SchedulerType"),
        ({"attention": "flash"}, "attention must be one of"),
        ({"learning_rate": float("nan")}, "learning_rate must be a finite number, got nan"),
        ({"learning_rate": -1e-3}, "learning_rate must be at least 0, got -0.001"),
        ({"weight_decay": float("inf")}, "weight_decay must be a finite number, got inf"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must be at least 0, got -1.0"),
        ({"adam_beta1": 1.5}, "optim=adamw.* Invalid beta parameter at index 0: 1.5"),
        ({"optim": "galore_adamw"}, "optim=galore_adamw .* need to install `galore_torch`"),
        ({"optim": "adam"}, "adam is not a valid OptimizerNames"),
        ({"lr_scheduler_kwargs": {"x": 1}}, "lr_scheduler_type=linear .*keyword argument 'x'"),
        ({"num_train_epochs": -1.0}, "num_train_epochs must be at least 0, got -1.0"),
        ({"max_steps": 0}, "max_steps must be at least 1, or -1 for num_train_epochs, got 0"),
        ({"max_steps": 10**30}, "max_steps must be a number of 64 bits, got 1000"),
        ({"save_steps": 0}, "save_steps must be above 0 for save_strategy=steps, got 0"),
        ({"seed": -1}, "seed must be from 0 to 4294967295, got -1"),
        ({"data_seed": 2**32}, "data_seed must be from 0 to 4294967295, got 4294967296"),
        ({"dataloader_num_workers": -1}, "dataloader_num_workers must be at least 0, got -1"),
        ({"report_to": "tensorbord"}, "report_to: tensorbord is not supported, only"),
        ({"deepspeed": "zero.json"}, "deepspeed needs another package: pip install deepspeed"),
        ({"save_strategy": "best"}, "save_strategy=best needs metric_for_best_model"),
        (
            {"load_best_model_at_end": True, "eval_strategy": "no", "save_strategy": "no"},
            "load_best_model_at_end needs evaluations, got eval_strategy=no",
        ),
        (
            {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "no"},
            "lr_scheduler_type reduce_lr_on_plateau requires an eval strategy",
        ),
        ({"output_dir": "~nosuchuser/run"}, "no user nosuchuser"),
        ({"output_dir": "run\0"}, "a path cannot hold a NUL character"),
    ],
)
def test_wrong_options_get_one_line(
    options: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "deepspeed" in options:
        monkeypatch.setattr("transformers.integrations.is_deepspeed_available", lambda: False)
    with pytest.raises(InputError, match=message) as caught:
        _config(**options)
    assert "\n" not in str(caught.value)


def test_a_tracker_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = "transformers.integrations.get_available_reporting_integrations"
    monkeypatch.setattr(found, lambda: ["wandb"])
    assert _config(report_to="wandb").report_to == ["wandb"]
    with pytest.raises(InputError, match="report_to=tensorboard needs another package: pip"):
        _config(report_to=["wandb", "tensorboard"])


def test_the_best_model_by_its_names() -> None:
    for name, key in {
        **{"eval_loss": "eval_loss", "ranking_accuracy": "rewards/accuracies"},
        **{"tau": "rank/kendall_tau", "val_rank/mrr": "val_rank/mrr"},
    }.items():
        config = _config(metric_for_best_model=name)
        assert config.metric_for_best_model == key
        check_best_metric(config)
        assert config.greater_is_better is not key.endswith("loss")
    check_best_metric(_config(metric_for_best_model="entropy", eval_token_statistics=True))
    for name, message in (
        ("acuracy", r"'acuracy', did you mean rewards/accuracies\?"),
        ("grad_norm", "must be one of loss, rank_loss, sft_loss, rewards/accuracies, "),
        ("entropy", "must be one of loss"),
    ):
        with pytest.raises(InputError, match=message):
            check_best_metric(_config(metric_for_best_model=name))


def test_the_output_folder_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that changes its folder later goes on writing where it began."""
    monkeypatch.chdir(tmp_path)
    assert _config(output_dir="run").output_dir == str(tmp_path / "run")


def test_the_precision_is_chosen_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "as asked" in _config(dtype="float32").dtype_reason
    bfloat16 = _config(dtype="bfloat16")
    assert bfloat16.weights_dtype == torch.bfloat16
    assert "lost" in bfloat16.dtype_reason
    if not torch.accelerator.is_available():
        with pytest.raises(InputError, match="found none: --use_cpu true"):
            RankConfig(bf16=True)
    computed = _config(bf16=True, use_cpu=True)
    assert computed.weights_dtype == torch.float32
    assert computed.mixed_precision == "bf16"
    if not torch.cuda.is_available():
        automatic = _config()
        assert automatic.mixed_precision == "no"
        assert "CPU" in automatic.dtype_reason
    with monkeypatch.context() as old:  # a GPU that has float16 alone
        old.setattr(torch.cuda, "is_available", lambda: True)
        old.setattr(torch.cuda, "is_bf16_supported", lambda: False)
        chosen = SimpleNamespace(dtype="auto", bf16=False, use_cpu=False)
        RankConfig._choose_precision(chosen)
        assert "--load_in_4bit save memory" in chosen._dtype_reason and not chosen.bf16
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    launched = _config(use_cpu=True)
    assert "launcher" in launched.dtype_reason
    # DeepSpeed compares the launcher's precision with the options.
    assert launched.bf16 and launched.mixed_precision == "bf16"
    asked = _config(use_cpu=True, dtype="float32")
    assert "the launcher has mixed precision 'bf16'" in asked.dtype_reason
    assert not asked.bf16 and asked.mixed_precision == "no"
    again = _config(use_cpu=True)  # the choice before is not the launcher's
    assert again.bf16 and again.dtype_reason == launched.dtype_reason
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(InputError, match="the launcher's mixed precision fp16 is not supported"):
        _config(use_cpu=True)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without accelerator")
def test_several_processes_without_accelerator_use_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    started = {}

    def only_check(self: RankConfig) -> None:
        started["use_cpu"] = self.use_cpu
        raise InputError("far enough")

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(RankConfig, "_choose_precision", only_check)
    with pytest.raises(InputError, match="far enough"):
        _config()
    assert started == {"use_cpu": True}


def test_several_gpus_in_one_process_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RankConfig, "n_gpu", property(lambda self: 2))
    with pytest.raises(InputError, match="2 GPUs are visible to one process.*torchrun"):
        _config()
