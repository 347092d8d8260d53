"""Options of a training run: transformers' ``TrainingArguments`` plus what ranking needs.

Subclassing keeps every option, environment variable and launcher people know; the alternative,
an own small set of options, would lose trackers, FSDP2 and DeepSpeed. Option names follow TRL
where it has them. Where a ``TrainingArguments`` default is unsafe here it is changed, and each
change says why.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import IntervalStrategy, TrainingArguments

from fastrank.attention.backends import BACKENDS
from fastrank.data.columns import GroupSizes
from fastrank.errors import InputError
from fastrank.losses import Loss, loss_from_name

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}
ATTENTION_HELP = "Attention backend of shared-prompt packs; auto chooses by device and model."


@dataclass
class RankConfig(TrainingArguments):
    """Arguments of `RankTrainer`. Those of ``TrainingArguments`` apply; what differs:

    ``per_device_train_batch_size`` counts prompts (groups), and together with
    ``gradient_accumulation_steps`` and the number of processes it only says how many groups a
    step has: the step's groups are cut into packs of at most ``max_tokens`` over all processes,
    and the loss is divided by the number of groups. How many packs a process runs one after the
    other follows from ``max_tokens``, so an accumulation of 2 means "twice the groups", not
    "two passes".

    Raises:
        InputError: an option that is wrong by itself or against another.
    """

    loss: str = field(
        default="rrhf",
        metadata={
            "help": "Ranking loss: rrhf, pro, ranknet, slic, simpo, ipo, dpo, lambdarank, "
            "listmle or listnet."
        },
    )
    loss_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "The loss's own options as JSON, e.g. '{\"margin\": 0.1}'."},
    )
    max_tokens: int = field(
        default=16384,
        metadata={"help": "Most tokens of a pack: the unit of one forward and backward pass."},
    )
    auto_find_pack_size: bool = field(
        default=False,
        metadata={"help": "When a pack does not fit into memory, halve max_tokens and go on."},
    )
    backprop: str = field(
        default="joint",
        metadata={
            "help": "joint: a group in one pack, forward and backward; two_phase: score every "
            "candidate first, then back-propagate only those with a gradient, in memory that does "
            "not grow with their number."
        },
    )
    shared_prompts: bool = field(
        default=True,
        metadata={"help": "Encode a prompt once for all of its candidates."},
    )
    attention: str = field(default="auto", metadata={"help": ATTENTION_HELP})
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Type of the weights: float32, bfloat16 (small updates are lost), or auto: "
            "float32, computed in bfloat16 where the device has it."
        },
    )
    disable_dropout: bool = field(
        default=True,
        metadata={"help": "Set every dropout of the model to 0, so that scores can be compared."},
    )
    nonfinite: str = field(
        default="stop",
        metadata={
            "help": "On a loss or gradient that is not finite: stop, or skip the records at fault."
        },
    )
    max_prompt_length: int | None = field(
        default=None,
        metadata={"help": "Most tokens of a prompt; longer ones lose their beginning."},
    )
    max_response_length: int | None = field(
        default=None,
        metadata={"help": "Most tokens of a response; longer ones lose their end."},
    )
    max_length: int | None = field(
        default=None,
        metadata={"help": "Most tokens of prompt and response together (default: the context)."},
    )

    # Changed defaults of TrainingArguments.
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder for checkpoints, metrics and plots."}
    )
    per_device_train_batch_size: int = field(
        default=4, metadata={"help": "Prompts (with all their candidates) a step, for a process."}
    )
    learning_rate: float = field(
        default=1e-5, metadata={"help": "The initial learning rate of AdamW."}
    )
    eval_strategy: IntervalStrategy | str = field(
        default="epoch", metadata={"help": "When to evaluate: no, steps or epoch."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps."})
    # The default True replaces a NaN loss by 0 in the log, and training goes on over spoilt
    # weights.
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Must stay False: it would hide a loss that is NaN."}
    )
    # A Group is no dictionary of model inputs; there are no columns to remove.
    remove_unused_columns: bool = field(default=False, metadata={"help": "Has no effect here."})
    # Every parameter takes part in every pack; the search for unused ones walks the graph each
    # time.
    ddp_find_unused_parameters: bool | None = field(
        default=False,
        metadata={"help": "For models with parameters that a forward pass may leave out."},
    )
    report_to: None | str | list[str] = field(
        default="none", metadata={"help": "Trackers, e.g. tensorboard or wandb."}
    )

    def __post_init__(self) -> None:
        if self.output_dir is None:
            self.output_dir = os.path.join("runs", "train")
        self._check_options()
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1
        if several and not torch.accelerator.is_available():
            # Otherwise every process trains an own copy into the same folder.
            self.use_cpu = True
        self._choose_precision()
        try:
            super().__post_init__()
        except ValueError as error:
            raise InputError(" ".join(str(error).split())) from error
        if self.n_gpu > 1:
            raise InputError(
                f"{self.n_gpu} GPUs are visible to one process, expected one GPU a process: start "
                f"with torchrun --nproc_per_node {self.n_gpu}, or set CUDA_VISIBLE_DEVICES=0"
            )

    def _check_options(self) -> None:
        if isinstance(self.loss_kwargs, str):
            try:
                self.loss_kwargs = json.loads(self.loss_kwargs)
            except json.JSONDecodeError as error:
                raise InputError(f"loss_kwargs must be JSON, got {self.loss_kwargs!r}") from error
        if self.loss_kwargs is not None and not isinstance(self.loss_kwargs, dict):
            raise InputError(f"loss_kwargs must be a JSON object, got {self.loss_kwargs!r}")
        _ = self.ranking_loss  # an unknown name or option shows before anything is loaded
        _choice("nonfinite", self.nonfinite, ("stop", "skip"))
        _choice("backprop", self.backprop, ("joint", "two_phase"))
        if self.two_phase and self.auto_find_pack_size:
            raise InputError(
                "auto_find_pack_size tries packs of whole groups, got backprop=two_phase, which "
                "splits them: set max_tokens"
            )
        _choice("dtype", self.dtype, tuple(DTYPES))
        _choice("attention", self.attention, ("auto", *BACKENDS))
        for name in ("max_tokens", "per_device_train_batch_size", "gradient_accumulation_steps"):
            _at_least(name, getattr(self, name), 1)
        for name in ("max_prompt_length", "max_response_length", "max_length"):
            if getattr(self, name) is not None:
                _at_least(name, getattr(self, name), 2 if name == "max_length" else 1)
        if self.logging_nan_inf_filter:
            raise InputError("logging_nan_inf_filter must be False, got True: it hides NaN losses")
        if self.auto_find_batch_size:
            raise InputError(
                "auto_find_batch_size would change the number of groups a step; "
                "use auto_find_pack_size, which changes only how a step is cut"
            )
        if self.label_smoothing_factor:
            raise InputError("label_smoothing_factor has no meaning for a ranking loss; leave it 0")
        if self.fp16:
            raise InputError(
                "fp16 is not supported (its range loses most of the loss's gradients); "
                "use bf16 or float32"
            )

    @cached_property
    def ranking_loss(self) -> Loss:
        """The loss named by ``loss`` and ``loss_kwargs``."""
        options = self.loss_kwargs if isinstance(self.loss_kwargs, dict) else {}
        try:
            return loss_from_name(self.loss, **options)
        except (TypeError, ValueError) as error:
            raise InputError(" ".join(str(error).split())) from error

    def _choose_precision(self) -> None:
        """Sets ``bf16`` where ``dtype`` leaves it open, and remembers why."""
        if self.dtype == "bfloat16":
            self._dtype_reason = (
                "bfloat16 weights, as asked: updates below 1/256 of a weight are lost"
            )
        elif self.bf16:
            self._dtype_reason = "float32 weights, computed in bfloat16, as asked"
        elif self.dtype == "float32":
            self._dtype_reason = "float32 weights and computation, as asked"
        elif "ACCELERATE_MIXED_PRECISION" in os.environ:
            chosen = os.environ["ACCELERATE_MIXED_PRECISION"]
            self._dtype_reason = f"float32 weights, mixed precision '{chosen}' as the launcher set"
        elif not self.use_cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported():
            self.bf16 = True
            self._dtype_reason = (
                "float32 weights (bfloat16 ones do not move at small learning rates), "
                "computed in bfloat16, which this GPU has"
            )
        else:
            device = (
                "a CPU computes"
                if self.use_cpu or not torch.cuda.is_available()
                else "this GPU has"
            )
            self._dtype_reason = f"float32 weights and computation: {device} no fast bfloat16"

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

    @property
    def groups_per_step(self) -> int:
        """Groups of one optimiser step, over all processes and accumulation."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise InputError(f"{name} must be at least {least}, got {value}")
