"""Options of a training run: transformers' ``TrainingArguments`` plus what ranking needs.

Subclassing keeps every option, environment variable and launcher that people know; the
alternative, a small set of our own, would lose trackers, FSDP2 and DeepSpeed. Option names follow
TRL where it has them. Where a ``TrainingArguments`` default is unsafe here it is changed, and each
change says why.
"""

from __future__ import annotations

import json
import os
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import IntervalStrategy, TrainingArguments

from fastrank import options as shared
from fastrank.arguments import HeadPathName
from fastrank.attention.backends import BACKENDS
from fastrank.data.columns import GroupSizes
from fastrank.data.user_functions import is_function, load_named
from fastrank.errors import InputError, one_line
from fastrank.function_loss import FunctionLoss, as_loss
from fastrank.loss import Loss
from fastrank.losses import loss_from_name
from fastrank.options.declare import change, check_least, check_values, option, options
from fastrank.training.early_checks import (
    check_deepspeed,
    check_evaluation,
    check_numbers,
    check_optimizer,
    check_trackers,
)
from fastrank.training.log_keys import canonical_name

_PRECISION = "ACCELERATE_MIXED_PRECISION"  # set by a launcher
_NO_FP16 = (
    "not supported (its range loses most of the loss's gradients): leave it out; a GPU without "
    "bfloat16 then computes in float32, and --use_peft, --load_in_4bit, --gradient_checkpointing "
    "and a smaller --max_tokens save memory"
)

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


@options
class RankConfig(
    TrainingArguments,
    shared.LossOptions,
    shared.NormalizeOptions,
    shared.SharingOptions,
    shared.DtypeOptions,
    shared.LengthOptions,
):
    """Arguments of `RankTrainer`. Those of ``TrainingArguments`` apply; what differs:

    ``per_device_train_batch_size`` counts prompts (groups), and together with
    ``gradient_accumulation_steps`` and the number of processes it only sets the number of groups
    per step: these are cut into packs of at most ``max_tokens`` over all processes, and the loss
    is divided by their number. The number of packs that a process runs one after the other
    follows from ``max_tokens``, so an accumulation of 2 means "twice the groups", not "two
    passes". ``groups_per_step`` gives the number itself.

    ``loss`` may also be a loss such as ``fastrank.PRO(top_k=1)``, or a function of scores and
    rewards, see `fastrank.FunctionLoss`; on the command line ``FILE.py:name`` of one.

    Raises:
        InputError: an option that is wrong by itself or against another.
    """

    written = ("output_dir",)

    groups_per_step: int | None = option(
        "Prompts per step over all processes, in place of per_device_train_batch_size and "
        "gradient_accumulation_steps: the same run on any number of processes.",
        default=None,
    )
    loss_kwargs: dict[str, Any] | str | None = option(
        "The loss's own options as JSON, e.g. '{\"margin\": 0.1}'.", default=None
    )
    auto_find_pack_size: bool = option(
        "When a pack does not fit into memory, halve max_tokens and go on.", default=False
    )
    backprop: Literal["joint", "two_phase"] = option(
        "joint: a group in one pack, forward and backward; two_phase: score every candidate first, "
        "then back-propagate only those with a gradient, in memory that does not grow with their "
        "number.",
        default="joint",
    )
    split_groups: bool = option(
        "Let processes share the candidates of a prompt that costs more than a process's part of a "
        "step, each of them encoding the prompt; the gradients are the same.",
        default=True,
    )
    disable_dropout: bool = option(
        "Set every dropout of the model to 0, so that scores can be compared.", default=True
    )
    nonfinite: Literal["stop", "skip"] = option(
        "On a loss or gradient that is not finite: stop, or skip the records at fault.",
        default="stop",
    )
    eval_token_statistics: bool = option(
        "Log entropy and mean_token_accuracy of evaluations, at the price of one more pass over "
        "their logits.",
        default=False,
    )
    resume_changed: list[str] | None = option(
        "What may differ from the run that wrote the checkpoint, e.g. learning_rate,loss; it then "
        "takes effect.",
        default=None,
    )
    head_path: HeadPathName = option(
        "fused: the loss inside the output head's own forward, or an error; logits: from the "
        "model's logits, which takes more memory; auto: fused wherever the head is a plain layer.",
        default="auto",
    )
    shared_prompts: bool = change("Encode a prompt once for all of its candidates.", default=True)
    dtype: Literal["auto", "float32", "bfloat16"] = change(
        "Weights in float32, bfloat16 (loses small updates), or auto: float32, "
        "computed in bfloat16 where the device has it."
    )

    model_card_template: str | None = option(
        "Jinja template of the model card beside every saved model, instead of fastrank's own.",
        default=None,
    )

    # Changed defaults of TrainingArguments.
    output_dir: str | None = change("Folder of the run (default: runs/train).", default=None)
    num_train_epochs: float = change("Passes over the training data.")
    max_steps: int = change("Steps in all, instead of epochs (-1: as many as these have).")
    resume_from_checkpoint: str | None = change("Go on from: a folder, true, or auto (if any).")
    per_device_train_batch_size: int = change(
        "Prompts (with all their candidates) per step and process.", default=4
    )
    learning_rate: float = change("The initial learning rate of AdamW.", default=1e-5)
    eval_strategy: IntervalStrategy | str = change(
        "When to evaluate: no, steps or epoch.", default="epoch"
    )
    logging_steps: float = change("Log every so many steps.", default=10)
    # The default True replaces a NaN loss by 0 in the log, and training goes on over spoilt
    # weights.
    logging_nan_inf_filter: bool = change(
        "Must stay False: it would hide a loss that is NaN.", default=False
    )
    # A Group is no dictionary of model inputs; there are no columns to remove.
    remove_unused_columns: bool = change("Has no effect here.", default=False)
    # Every parameter takes part in every pack; the search for unused ones walks the graph each
    # time.
    ddp_find_unused_parameters: bool | None = change(
        "For models with parameters that a forward pass may leave out.", default=False
    )
    report_to: None | str | list[str] = change(
        "Trackers, e.g. tensorboard or wandb.", default="none"
    )

    def __post_init__(self) -> None:
        if self.output_dir is None:
            self.output_dir = os.path.join("runs", "train")
        check_values(self)
        self._check_options()
        check_numbers(self)
        check_deepspeed(self)
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1
        if several and not torch.accelerator.is_available():
            # Otherwise every process trains an own copy into the same folder.
            self.use_cpu = True
        launcher = os.environ.get(_PRECISION)
        self._choose_precision()
        if (self.bf16 or self.bf16_full_eval) and not (
            self.use_cpu or torch.accelerator.is_available()
        ):
            raise InputError(
                "bf16 expected a GPU, found none: --use_cpu true (use_cpu=True) computes in "
                "bfloat16 on the CPU"
            )
        try:
            super().__post_init__()
        except ModuleNotFoundError:
            raise
        except Exception as error:  # transformers checks by errors of many types
            raise InputError(one_line(error, 400) or type(error).__name__) from error
        finally:
            if launcher is not None:  # for the next arguments of this process
                os.environ[_PRECISION] = launcher
        check_trackers(self.report_to)  # type: ignore[arg-type]  # a list by now
        check_evaluation(self)
        check_optimizer(self)
        if self.n_gpu > 1:
            raise InputError(
                f"{self.n_gpu} GPUs are visible to one process, expected one GPU per process: "
                f"start with torchrun --nproc_per_node {self.n_gpu}, or set CUDA_VISIBLE_DEVICES=0"
            )

    def _check_options(self) -> None:
        if isinstance(self.loss_kwargs, str):
            try:
                self.loss_kwargs = json.loads(self.loss_kwargs)
            except json.JSONDecodeError as error:
                raise InputError(f"loss_kwargs must be JSON, got {self.loss_kwargs!r}") from error
        if self.loss_kwargs is not None and not isinstance(self.loss_kwargs, dict):
            raise InputError(f"loss_kwargs must be a JSON object, got {self.loss_kwargs!r}")
        chosen = self.ranking_loss  # an unknown name or option shows before anything is loaded
        if not isinstance(self.loss, str):
            # A checkpoint pickles these arguments, which a bare function need not survive.
            self.loss, self.loss_kwargs, self.normalize = chosen, None, None
        if self.metric_for_best_model is not None:
            self.metric_for_best_model = canonical_name(self.metric_for_best_model)
        _choice("nonfinite", self.nonfinite, ("stop", "skip"))
        _choice("backprop", self.backprop, ("joint", "two_phase"))
        if self.two_phase and self.auto_find_pack_size:
            raise InputError(
                "auto_find_pack_size tries packs of whole groups, got backprop=two_phase, which "
                "splits them: set max_tokens"
            )
        _choice("head_path", self.head_path, get_args(HeadPathName))
        _choice("dtype", self.dtype, tuple(DTYPES))
        _choice("attention", self.attention, ("auto", *BACKENDS))
        check_least(
            self,
            max_tokens=1,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=1,
            groups_per_step=1,
            max_prompt_length=1,
            max_response_length=1,
            max_length=2,
        )
        if self.groups_per_step is not None and self.gradient_accumulation_steps > 1:
            raise InputError(
                "groups_per_step counts all prompts of a step, expected no "
                f"gradient_accumulation_steps beside it, got {self.gradient_accumulation_steps}"
            )
        if self.logging_nan_inf_filter:
            raise InputError("logging_nan_inf_filter must be False, got True: it hides NaN losses")
        if self.auto_find_batch_size:
            raise InputError(
                "auto_find_batch_size would change the number of groups per step; "
                "use auto_find_pack_size, which changes only how a step is cut"
            )
        if self.label_smoothing_factor:
            raise InputError("label_smoothing_factor has no meaning for a ranking loss; leave it 0")
        if self.fp16:
            raise InputError(f"fp16 is {_NO_FP16}")

    def to_dict(self) -> dict[str, Any]:
        """As ``TrainingArguments.to_dict``; a loss that is no name by what it prints."""
        found: dict[str, Any] = super().to_dict()
        if not isinstance(self.loss, str):
            found["loss"] = repr(self.loss)
        return found

    @cached_property
    def ranking_loss(self) -> Loss:
        """What ``loss`` names or is, with ``loss_kwargs`` and ``normalize``."""
        options = dict(self.loss_kwargs) if isinstance(self.loss_kwargs, dict) else {}
        chosen: Any = self.loss
        try:
            if self.normalize is not None and "normalize" in options:
                raise ValueError("normalize and loss_kwargs must not both set normalize")
            if self.normalize is not None:
                options["normalize"] = self.normalize
            if isinstance(chosen, str) and is_function(chosen):
                chosen = load_named(chosen, "loss")
            if isinstance(chosen, str):
                return loss_from_name(chosen, **options)
            if isinstance(chosen, type) and issubclass(chosen, Loss):
                return chosen(**options)
            if not isinstance(chosen, Loss) and callable(chosen):
                return FunctionLoss(chosen, **options)
            if options:
                raise ValueError(
                    f"loss_kwargs and normalize go with a loss's name or function, got {chosen}"
                )
            return as_loss(chosen)
        except (TypeError, ValueError) as error:
            raise InputError(" ".join(str(error).split())) from error

    def _choose_precision(self) -> None:
        """Set ``bf16`` where ``dtype`` leaves it open, and record the reason; a launcher's choice
        becomes that of the options, which DeepSpeed compares with it."""
        launcher = os.environ.get(_PRECISION)
        if launcher == "fp16" and self.dtype == "auto" and not self.bf16:
            raise InputError(f"the launcher's mixed precision {launcher} is {_NO_FP16}")
        if self.dtype == "bfloat16":
            self.bf16 = self.bf16 or launcher == "bf16"
            self._dtype_reason = (
                "bfloat16 weights, as asked: updates below 1/256 of a weight are lost"
            )
        elif self.bf16:
            self._dtype_reason = "float32 weights, computed in bfloat16, as asked"
        elif self.dtype == "float32":
            self._dtype_reason = "float32 weights and computation, as asked"
            if launcher not in (None, "no"):
                os.environ[_PRECISION] = "no"  # which Trainer's arguments read
                self._dtype_reason += f" (the launcher has mixed precision '{launcher}')"
        elif launcher is not None:
            self.bf16 = launcher == "bf16"
            self._dtype_reason = (
                f"float32 weights, mixed precision '{launcher}' as the launcher set"
            )
        elif not self.use_cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported():
            self.bf16 = True
            self._dtype_reason = (
                "float32 weights (bfloat16 ones do not move at small learning rates), "
                "computed in bfloat16, which this GPU has"
            )
        elif self.use_cpu or not torch.cuda.is_available():
            self._dtype_reason = "float32 weights and computation: a CPU computes no fast bfloat16"
        else:
            self._dtype_reason = (
                "float32 weights and computation: this GPU has no fast bfloat16, and fp16 is not "
                "supported; --use_peft and --load_in_4bit save memory"
            )

    @property
    def dtype_reason(self) -> str:
        """One line: the precision chosen, and why."""
        return self._dtype_reason

    @property
    def weights_dtype(self) -> torch.dtype:
        """The type to load weights in; transformers' own default, the file's, is often bfloat16."""
        return DTYPES[self.dtype] or torch.float32

    @property
    def two_phase(self) -> bool:
        """Whether candidates are scored first, and only live ones back-propagated."""
        return self.backprop == "two_phase"

    def tokens_at_once(self, sizes: GroupSizes) -> NDArray[np.int64]:
        """Tokens of every group that have to fit into one pack: int64 [N]."""
        return sizes.longest_sequence if self.two_phase else sizes.pack_tokens(self.shared_prompts)

    def groups_over(self, replicas: int) -> int:
        """Groups of one optimiser step, over replicas of the model that take different data: as
        many as processes, but for those that hold parts of one tensor-parallel model."""
        if self.groups_per_step is not None:
            return self.groups_per_step
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * replicas


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
