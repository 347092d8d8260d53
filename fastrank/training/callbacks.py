"""Callbacks of a run: progress bar and readable lines, and ``metrics.jsonl``.

Lines go to stdout, and on a terminal above the bar, which is on stderr.

The metrics file has one line per log entry, in the order of the run, also across interruptions: a
run that is killed has logged entries that its last checkpoint does not know; resumed, it makes
them again. So the file is first written anew from the checkpoint's own history, and reads as if
nothing had happened.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sized
from pathlib import Path
from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from fastrank.console import Bar
from fastrank.errors import InputError
from fastrank.modeling.prepare import head_path_of
from fastrank.training.log_keys import LOG_KEYS

METRICS_FILE = "metrics.jsonl"

#: Options that an optimiser's state depends on, so that another's does not fit.
_OPTIMIZER = frozenset(["optim", "optim_target_modules"])
_SCHEDULE = frozenset(["lr_scheduler_type"])
_BEST = frozenset(["metric_for_best_model", "greater_is_better", "evaluation"])


def format_line(logs: dict[str, Any], step: int, max_steps: int) -> str | None:
    """One line for a training or evaluation log; None for logs that are neither.

    >>> format_line({"loss": 0.25, "rewards/accuracies": 0.8125, "epoch": 1.0}, 20, 300)
    'step  20/300  loss 0.2500  rewards/accuracies 0.812'
    """
    prefix = next((k[: -len("_rank_loss")] for k in logs if k.endswith("_rank_loss")), None)
    if prefix is not None:
        values = {k.removeprefix(f"{prefix}_"): v for k, v in logs.items()}
        head = f"{prefix.replace('_', ' ')} at step {step}:"
    elif "loss" in logs:
        values = logs
        head = f"step {step:>{len(str(max_steps))}}/{max_steps}"
    else:
        return None
    shown = [
        f"{key.name} {key.form.format(values[key.name])}"
        for key in LOG_KEYS
        if key.in_line and isinstance(values.get(key.name), (int, float))
    ]
    return "  ".join([head, *shown])


class RankProgress(TrainerCallback):
    """The bar with the time that is left, and the lines, the first of which names the head path;
    without a bar (``--disable_tqdm``, or no terminal) the lines alone."""

    def __init__(self, disable_bar: bool | None = False) -> None:
        self.disable_bar = bool(disable_bar)
        self._training: Bar | None = None
        self._evaluation: Bar | None = None

    def on_train_begin(
        self, args: Any, state: TrainerState, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        self._step = state.global_step
        if state.is_world_process_zero and not self.disable_bar:
            self._training = Bar(
                desc="training", total=state.max_steps, initial=state.global_step, unit="steps"
            )
        if model is None:
            return
        path = head_path_of(model)  # raises, on every process, if it is not the one asked for
        if state.is_world_process_zero:
            print(f"head: {path or 'measured with the first pack'}", flush=True)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self._training is not None:
            self._training.update(state.global_step - self._step)
        self._step = state.global_step

    def on_prediction_step(
        self,
        args: Any,
        state: TrainerState,
        control: Any,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        if self._evaluation is None and state.is_world_process_zero and not self.disable_bar:
            total = len(eval_dataloader) if isinstance(eval_dataloader, Sized) else None
            self._evaluation = Bar(desc="evaluating", total=total, unit="packs")
        if self._evaluation is not None:
            self._evaluation.update()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._evaluation is not None:
            self._evaluation.close()
        self._evaluation = None

    def on_predict(self, *args: Any, **kwargs: Any) -> None:
        self.on_evaluate(*args, **kwargs)

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any
    ) -> None:
        line = format_line(logs or {}, state.global_step, state.max_steps)
        if line is not None and state.is_world_process_zero:
            print(line, flush=True)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self._training is not None:
            self._training.close()
        self._training = None


class MetricsFile(TrainerCallback):
    """Appends every log entry to ``<output_dir>/metrics.jsonl`` as it is made."""

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / METRICS_FILE

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        known = [{"step": row["step"], **row} for row in state.log_history]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(_line(row) for row in known), encoding="utf-8")
        partial.replace(self.path)

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and logs:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line({"step": state.global_step, **logs}))


class Renewal(TrainerCallback):
    """Lays a run's own options over the state of a checkpoint, so that what may differ on resuming
    takes effect.

    An optimiser's state holds its hyperparameters, and a schedule's its learning rates: options
    given at resume would do nothing, in silence. Here those of the options are put back after the
    state was loaded, and the learning rate is worked out from the schedule as it is now, at the
    step that was reached.

    Attributes:
        changed: names of the run's plan that differ from the checkpoint's; see
            `fastrank.training.plan`.
    """

    def __init__(self) -> None:
        self.changed: frozenset[str] = frozenset()
        self._groups: list[dict[str, Any]] = []
        self._schedule: dict[str, Any] = {}

    @property
    def new_optimizer(self) -> bool:
        """Whether the optimiser begins without the state of another one."""
        return bool(self.changed & _OPTIMIZER)

    @property
    def new_schedule(self) -> bool:
        """Whether the schedule begins without the state of another one."""
        return bool(self.changed & _SCHEDULE)

    def remember_optimizer(self, optimizer: Any) -> None:
        """Keep the options of a new optimiser, before a state is loaded into it."""
        self._groups = [
            {name: value for name, value in group.items() if name != "params"}
            for group in optimizer.param_groups
        ]

    def remember_schedule(self, scheduler: Any) -> None:
        """Keep the options of a new schedule, before a state is loaded into it."""
        self._schedule = scheduler.state_dict()
        # A schedule notes in the optimiser the learning rate that it starts from.
        for group, own in zip(self._groups, scheduler.optimizer.param_groups, strict=True):
            if "initial_lr" in own:
                group["initial_lr"] = own["initial_lr"]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Trainer goes on with the checkpoint's intervals of logs, evaluations and saves.
        state.compute_steps(args, state.max_steps)
        if not self.changed:
            return
        if self.changed & _BEST:
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None
        self._renew(kwargs["optimizer"], kwargs["lr_scheduler"], state.global_step)

    def _renew(self, optimizer: Any, scheduler: Any, step: int) -> None:
        for group, own in zip(optimizer.param_groups, self._groups, strict=True):
            group.update((name, value) for name, value in own.items() if name != "lr")
        if isinstance(scheduler, LambdaLR):
            bases = self._schedule["base_lrs"]
            factors = scheduler.lr_lambdas
            rates = [base * factor(step) for base, factor in zip(bases, factors, strict=True)]
            now = {"last_epoch": step, "_step_count": step + 1, "_last_lr": rates}
            scheduler.load_state_dict(self._schedule | now)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
        elif "learning_rate" in self.changed and not self.new_schedule:
            raise InputError(
                "--resume_changed learning_rate: this schedule's learning rate is its own state; "
                "change lr_scheduler_type too, or begin a new run"
            )


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a last line that was cut off by a kill is left out."""
    if not Path(path).is_file():
        return []
    rows = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _line(row: dict[str, Any]) -> str:
    # JSON has no NaN: a value that is not finite is written as null.
    clean = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }
    return json.dumps(clean, default=os.fspath) + "\n"
