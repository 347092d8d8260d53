"""Options of ``fastrank train`` beside `RankConfig`."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Literal

from fastrank import options as shared
from fastrank.errors import InputError
from fastrank.options.declare import Options, check_least, option, options

#: Defaults that suit the built-in task: a tiny model from scratch instead of a large one.
BUILT_IN_DEFAULTS = {
    "output_dir": "runs/built-in",
    "learning_rate": 2e-3,
    "per_device_train_batch_size": 16,
    "num_train_epochs": 4.0,
    "logging_steps": 12,
}


@options
class AdapterOptions(Options):
    """LoRA adapters; the names are those of TRL."""

    use_peft: bool = option("Train a LoRA adapter instead of the model's weights.", default=False)
    lora_r: int = option("Rank of the adapter's matrices.", default=16)
    lora_alpha: int = option("The adapter is scaled by alpha / r.", default=32)
    lora_dropout: float = option(
        "Dropout before the adapter; needs --disable_dropout false.", default=0.0
    )
    lora_target_modules: list[str] | None = option(
        "Names of modules to adapt, or all-linear (default: PEFT's choice).", default=None
    )
    lora_target_parameters: list[str] | None = option(
        "Parameters to adapt that are no module of their own.", default=None
    )
    lora_modules_to_save: list[str] | None = option(
        "Modules to train whole and to save with the adapter.", default=None
    )
    use_rslora: bool = option("Scale by alpha / sqrt(r) instead.", default=False)
    use_dora: bool = option("Train magnitudes as well (weight-decomposed LoRA).", default=False)
    merge_adapter: bool = option(
        "Also write the model with the adapter merged in, to merged/.", default=False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for own in fields(AdapterOptions):
            if not self.use_peft and getattr(self, own.name) != own.default:
                raise InputError(f"--{own.name} needs --use_peft true")
        check_least(self, lora_r=1, lora_alpha=1)
        if not 0 <= self.lora_dropout < 1:
            raise InputError(
                f"lora_dropout must be at least 0 and below 1, got {self.lora_dropout}"
            )


@options
class QuantizationOptions(Options):
    """A quantised model below an adapter (QLoRA), by bitsandbytes; the names are those of TRL."""

    load_in_4bit: bool = option(
        "Load the model's linear layers in 4 bits; needs --use_peft.", default=False
    )
    load_in_8bit: bool = option("Load them in 8 bits; needs --use_peft.", default=False)
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = option("Kind of 4-bit numbers.", default="nf4")
    use_bnb_nested_quant: bool = option(
        "Quantise the scales of 4-bit numbers as well.", default=False
    )

    @property
    def quantized(self) -> bool:
        """Whether the model is quantised when it is loaded."""
        return self.load_in_4bit or self.load_in_8bit


@options
class HubDataOptions(Options):
    """Parts of a data set that --data names; the names are those of TRL."""

    dataset_config: str | None = option("Configuration of the data set.", default=None)
    dataset_train_split: str | None = option("Split to train on (default: train).", default=None)
    dataset_test_split: str | None = option("Split to hold out.", default=None)


@options
class CacheOptions(Options):
    """Tokenised data."""

    written = ("cache_dir",)

    cache_dir: str | None = option(
        "Folder for tokenised data of any size, for later starts (default: data from 8 MiB on, in "
        "$HF_HOME/fastrank or ~/.cache/fastrank).",
        default=None,
    )
    no_cache: bool = option("Tokenise at every start and hold all of it in memory.", default=False)
    dataset_num_proc: int | None = option(
        "Processes that tokenise (default: one per core).", default=None
    )


@options
class TrainOptions(
    shared.ModelOptions,
    shared.DataOptions,
    shared.ReadOptions,
    shared.TemplateOptions,
    shared.SameTokensOptions,
    CacheOptions,
    AdapterOptions,
    QuantizationOptions,
    HubDataOptions,
    shared.TrustOptions,
    shared.JsonOptions,
):
    """Model and data of a run; without either the built-in task is trained."""

    eval_data: str | None = option(
        "Records held out; without it a share of --data is.", default=None
    )
    eval_fraction: float = option("Share of the prompts of --data to hold out.", default=0.1)
    eval_groups: int = option(
        "Most prompts of the training split to evaluate before and after.", default=512
    )
    reference_model: str | None = option(
        "Reference of DPO-like losses (default: --model as it is before training); its scores are "
        "computed once and kept.",
        default=None,
    )
    tp_size: int = option(
        "Processes that hold one copy of the model together, in tensor parallelism; copies beyond "
        "the first are sharded by FSDP2.",
        default=1,
    )
    overwrite_output_dir: bool = option(
        "Remove an earlier run's checkpoints and begin anew.", default=False
    )

    def __post_init__(self) -> None:
        self._check_source()
        super().__post_init__()
        check_least(self, tp_size=1, eval_groups=0, dataset_num_proc=1)
        self._name_splits()
        if self.load_in_4bit and self.load_in_8bit:
            raise InputError(
                "--load_in_4bit and --load_in_8bit are two ways of one thing, got both"
            )
        if self.quantized and not self.use_peft:
            bits = 4 if self.load_in_4bit else 8
            raise InputError(
                f"--load_in_{bits}bit needs --use_peft true: quantised weights cannot be trained"
            )
        if self.quantized and self.tp_size > 1:
            raise InputError(f"a quantised model needs tp_size=1, got {self.tp_size}")
        if not 0 <= self.eval_fraction < 1:
            raise InputError(
                f"eval_fraction must be at least 0 and below 1, got {self.eval_fraction}"
            )

    def _name_splits(self) -> None:
        """Put configuration and splits into the data set's name, as `load_groups` reads it."""
        config, test = self.dataset_config, self.dataset_test_split
        given = next((f.name for f in fields(HubDataOptions) if getattr(self, f.name)), None)
        if given is None:
            return
        name = self.data
        if name is None or ":" in name or Path(name).is_file():
            raise InputError(f"--{given} needs --data with the name of a data set, got {name}")
        if test is not None and self.eval_data is not None:
            raise InputError("--dataset_test_split and --eval_data both name held-out data")
        begin = name if config is None else f"{name}:{config}"
        self.data = f"{begin}:{self.dataset_train_split or 'train'}"
        if test is not None:
            self.eval_data = f"{begin}:{test}"

    def _check_source(self) -> None:
        """Refuse a model without data, data without a model, and what the built-in task lacks."""
        if (self.model is None) != (self.data is None):
            given, absent = ("model", "data") if self.data is None else ("data", "model")
            raise InputError(f"--{given} needs --{absent} too (without both: the built-in task)")
        for name in (
            "eval_data",
            "reference_model",
            "use_peft",
            "as_chat",
            "chat_template",
            "chat_template_kwargs",
        ):
            if self.built_in and getattr(self, name) not in (None, False):
                raise InputError(f"--{name} needs --model and --data, got neither")
        if self.built_in and self.tp_size != 1:
            raise InputError("--tp_size needs --model and --data, got neither")

    @property
    def built_in(self) -> bool:
        """Whether the built-in task is trained."""
        return self.model is None
