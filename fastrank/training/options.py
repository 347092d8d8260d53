"""What ``fastrank train`` needs to know besides `RankConfig`, and the built-in task's own
defaults."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from fastrank.errors import InputError
from fastrank.training.config import RankConfig

_WITH_ADAPTER = ("use_rslora", "use_dora", "merge_adapter")


@dataclass
class TrainOptions:
    """Model and data of a run; without either the built-in task is trained."""

    model: str | None = field(
        default=None, metadata={"help": "Model folder or Hub name to start from."}
    )
    data: str | None = field(
        default=None, metadata={"help": "Ranked records: JSONL, JSON, Parquet, or a Hub data set."}
    )
    eval_data: str | None = field(
        default=None, metadata={"help": "Records held out; without it a share of --data is."}
    )
    eval_fraction: float = field(
        default=0.1, metadata={"help": "Share of the prompts of --data to hold out."}
    )
    eval_groups: int = field(
        default=512,
        metadata={"help": "Most prompts of the training split to evaluate before and after."},
    )
    format: str | None = field(
        default=None, metadata={"help": "Format of the records, if not to be recognised."}
    )
    score_key: str | None = field(
        default=None, metadata={"help": "Field that holds the scores, if not the format's own."}
    )
    max_candidates: int | None = field(
        default=None, metadata={"help": "Most candidates of a prompt; see fastrank inspect."}
    )
    normalize_rewards: str = field(
        default="none", metadata={"help": "none, or group: zero mean, unit deviation in a group."}
    )
    cache_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder for tokenised data of any size, for later starts (default: data from "
            "8 MiB on, in $HF_HOME/fastrank or ~/.cache/fastrank)."
        },
    )
    no_cache: bool = field(
        default=False, metadata={"help": "Tokenise at every start and hold all of it in memory."}
    )
    dataset_num_proc: int | None = field(
        default=None, metadata={"help": "Processes that tokenise (default: one a core)."}
    )
    reference_model: str | None = field(
        default=None,
        metadata={
            "help": "Reference of DPO-like losses (default: --model as it is before training); its "
            "scores are computed once and kept."
        },
    )
    use_peft: bool = field(
        default=False,
        metadata={"help": "Train a LoRA adapter instead of the model's weights."},
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter's matrices."})
    lora_alpha: int = field(default=32, metadata={"help": "The adapter is scaled by alpha / r."})
    lora_dropout: float = field(
        default=0.0,
        metadata={"help": "Dropout before the adapter; needs --disable_dropout false."},
    )
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Names of modules to adapt, or all-linear (default: PEFT's choice)."},
    )
    lora_target_parameters: list[str] | None = field(
        default=None, metadata={"help": "Parameters to adapt that are no module of their own."}
    )
    lora_modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules to train whole and to save with the adapter."}
    )
    use_rslora: bool = field(default=False, metadata={"help": "Scale by alpha / sqrt(r) instead."})
    use_dora: bool = field(
        default=False, metadata={"help": "Train magnitudes as well (weight-decomposed LoRA)."}
    )
    merge_adapter: bool = field(
        default=False,
        metadata={"help": "Also write the model with the adapter merged in, to merged/."},
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run model code that comes with the weights."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Remove an earlier run's checkpoints and begin anew."}
    )
    json: bool = field(
        default=False, metadata={"help": "Print the result as one JSON object on the last line."}
    )

    def __post_init__(self) -> None:
        if (self.model is None) != (self.data is None):
            given, absent = ("model", "data") if self.data is None else ("data", "model")
            raise InputError(f"--{given} needs --{absent} too (without both: the built-in task)")
        for name in ("eval_data", "reference_model", "use_peft"):
            if self.built_in and getattr(self, name) not in (None, False):
                raise InputError(f"--{name} needs --model and --data, got neither")
        self._check_adapter()
        if not 0 <= self.eval_fraction < 1:
            raise InputError(
                f"eval_fraction must be at least 0 and below 1, got {self.eval_fraction}"
            )

    def _check_adapter(self) -> None:
        for option in fields(self):
            of_adapter = option.name.startswith("lora_") or option.name in _WITH_ADAPTER
            if of_adapter and not self.use_peft and getattr(self, option.name) != option.default:
                raise InputError(f"--{option.name} needs --use_peft true")
        for name in ("lora_r", "lora_alpha"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.lora_dropout < 1:
            raise InputError(
                f"lora_dropout must be at least 0 and below 1, got {self.lora_dropout}"
            )

    @property
    def built_in(self) -> bool:
        return self.model is None


@dataclass
class BuiltInConfig(RankConfig):
    """Defaults that suit the built-in task: a tiny model from scratch instead of a large one."""

    output_dir: str | None = field(
        default="runs/built-in", metadata={"help": "Folder for checkpoints, metrics and plots."}
    )
    learning_rate: float = field(
        default=2e-3, metadata={"help": "The initial learning rate of AdamW."}
    )
    per_device_train_batch_size: int = field(
        default=16, metadata={"help": "Prompts a step, for each process."}
    )
    num_train_epochs: float = field(default=4.0, metadata={"help": "Passes over the data."})
    logging_steps: float = field(default=12, metadata={"help": "Log every so many steps."})
