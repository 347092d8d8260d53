"""What is known to be wrong with a run's options before a model is loaded.

transformers looks at many options only when they are first used: a learning rate when the
optimiser is made, a tracker when training begins, the metric of the best model after the first
evaluation. By then models are loaded and hours may have passed. Here all of that is tried on the
options alone.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from transformers import IntervalStrategy, SchedulerType, Trainer, TrainingArguments, get_scheduler
from transformers.trainer_utils import SaveStrategy
from transformers.training_args import OptimizerNames

from fastrank.errors import InputError, one_line
from fastrank.training.log_keys import ALIASES, LOG_KEYS, TOKEN_STATISTICS, canonical_name

if TYPE_CHECKING:
    from fastrank.training.config import RankConfig

#: Bounds of options of ``TrainingArguments``, both included.
_BOUNDS: dict[str, tuple[float, float]] = {
    "learning_rate": (0, math.inf),
    "weight_decay": (0, math.inf),
    "adam_epsilon": (0, math.inf),
    "max_grad_norm": (0, math.inf),
    "num_train_epochs": (0, math.inf),
    "neftune_noise_alpha": (0, math.inf),
    "warmup_steps": (0, math.inf),
    "eval_delay": (0, math.inf),
    "save_total_limit": (0, math.inf),
    "per_device_eval_batch_size": (1, math.inf),
    "eval_accumulation_steps": (1, math.inf),
    "dataloader_num_workers": (0, math.inf),
    "dataloader_prefetch_factor": (1, math.inf),
    "ddp_bucket_cap_mb": (1, math.inf),
    "ddp_timeout": (1, math.inf),
    "seed": (0, 2**32 - 1),  # what numpy takes
    "data_seed": (0, 2**32 - 1),
}

#: Intervals, which count only with the strategy "steps".
_INTERVALS = {
    "logging_steps": "logging_strategy",
    "eval_steps": "eval_strategy",
    "save_steps": "save_strategy",
}

#: Optimisers that cannot be tried without the model: only their packages are looked for.
_NEED_MODEL = ("galore", "apollo", "lomo", "adalomo")


def check_numbers(config: TrainingArguments) -> None:
    """Raise `InputError` for a number that is out of range."""
    for name, (low, high) in _BOUNDS.items():
        value = getattr(config, name, None)
        if value is not None and not low <= value <= high:
            wanted = f"at least {low}" if math.isinf(high) else f"from {low} to {high}"
            raise InputError(f"{name} must be {wanted}, got {value}")
    if config.max_steps != -1 and config.max_steps < 1:
        raise InputError(
            f"max_steps must be at least 1, or -1 for num_train_epochs, got {config.max_steps}"
        )
    for name, strategy in _INTERVALS.items():
        value = getattr(config, name)
        if getattr(config, strategy) == IntervalStrategy.STEPS and value is not None and value <= 0:
            raise InputError(f"{name} must be above 0 for {strategy}=steps, got {value}")


def check_deepspeed(config: TrainingArguments) -> None:
    """Raise `InputError` for a DeepSpeed file without DeepSpeed."""
    from transformers.integrations import is_deepspeed_available

    if config.deepspeed and not is_deepspeed_available():
        raise InputError("deepspeed needs another package: pip install deepspeed")


def check_trackers(names: Sequence[str]) -> None:
    """Raise `InputError` for a tracker that does not exist or is not installed."""
    from transformers.integrations import (
        get_available_reporting_integrations,
        get_reporting_integration_callbacks,
    )

    for name in names:
        try:
            get_reporting_integration_callbacks([name])
        except ValueError as error:
            raise InputError(f"report_to: {one_line(error, 400)}") from error
        if name not in get_available_reporting_integrations() and name != "flyte":
            raise InputError(f"report_to={name} needs another package: pip install {name}")


def check_optimizer(config: TrainingArguments) -> None:
    """Raise `InputError` where optimiser or schedule cannot be made of the options: both are tried
    on one number."""
    weight = torch.nn.Linear(1, 1)
    name = OptimizerNames(config.optim).value
    try:
        made, options = Trainer.get_optimizer_cls_and_kwargs(config, weight)  # type: ignore[arg-type]
        optimizer = made(weight.parameters(), **{"weight_decay": config.weight_decay} | options)
        get_scheduler(
            config.lr_scheduler_type,
            optimizer,
            num_warmup_steps=0,
            num_training_steps=1,
            scheduler_specific_kwargs=config.lr_scheduler_kwargs,  # type: ignore[arg-type]
        )
    except Exception as error:  # each optimiser and schedule has its own types
        if name.startswith(_NEED_MODEL) and not isinstance(error, ImportError):
            return
        schedule = SchedulerType(config.lr_scheduler_type).value
        raise InputError(
            f"optim={name} with lr_scheduler_type={schedule} cannot be made of these options: "
            f"{one_line(error)}"
        ) from error


def uses_evaluation(config: TrainingArguments) -> str | None:
    """The option that makes evaluations decide about the run; None if they only inform."""
    plateau = (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)
    if config.load_best_model_at_end:
        return "load_best_model_at_end"
    if config.save_strategy == SaveStrategy.BEST:
        return "save_strategy=best"
    return "lr_scheduler_type" if config.lr_scheduler_type in plateau else None


def check_evaluation(config: RankConfig) -> None:
    """Raise `InputError` for options that need evaluations where there are none."""
    option = uses_evaluation(config)
    if option is not None and config.eval_strategy == IntervalStrategy.NO:
        raise InputError(f"{option} needs evaluations, got eval_strategy=no")
    if config.save_strategy == SaveStrategy.BEST and config.metric_for_best_model is None:
        raise InputError("save_strategy=best needs metric_for_best_model, e.g. loss, got none")


def check_best_metric(config: RankConfig) -> None:
    """Raise `InputError` for a ``metric_for_best_model`` that no evaluation has, unless
    ``compute_metrics`` adds it."""
    name = config.metric_for_best_model
    known = tuple(
        key.name
        for key in LOG_KEYS
        if key.of in ("both", "evaluation")
        and (config.eval_token_statistics or key.name not in TOKEN_STATISTICS)
    )
    if name is None or name.endswith(known):  # "eval_loss", "val_loss" of one of several sets
        return
    near = difflib.get_close_matches(name, [*known, *ALIASES], 1)
    hint = f", did you mean {canonical_name(near[0])}?" if near else ""
    raise InputError(
        f"metric_for_best_model must be one of {', '.join(known)}, got '{name[:60]}'{hint}"
    )
