"""What ``fastrank train`` needs to know besides `RankConfig`, and the built-in task's own
defaults."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastrank.errors import InputError
from fastrank.training.config import RankConfig


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
        for name in ("eval_data", "reference_model"):
            if self.built_in and getattr(self, name) is not None:
                raise InputError(f"--{name} needs --model and --data, got neither")
        if not 0 <= self.eval_fraction < 1:
            raise InputError(
                f"eval_fraction must be at least 0 and below 1, got {self.eval_fraction}"
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
