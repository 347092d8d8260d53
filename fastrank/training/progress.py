"""Progress bar and one readable line a logging step, side by side.

Lines go to stdout through the bar's own ``write``, so that neither breaks the other; the bar is
on stderr and refreshed rarely where that is no terminal, so that a log file stays readable.
"""

from __future__ import annotations

import sys
from typing import Any

from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments

# log key: (label, format); in the order of the line
_COLUMNS = {
    "loss": ("loss", "{:.4f}"),
    "rank_loss": ("rank", "{:.4f}"),
    "sft_loss": ("sft", "{:.4f}"),
    "rewards/accuracies": ("accuracy", "{:.3f}"),
    "rewards/margins": ("margin", "{:+.3f}"),
    "rank/kendall_tau": ("tau", "{:+.3f}"),
    "rank/top1": ("top1", "{:.3f}"),
    "rank/ndcg": ("ndcg", "{:.3f}"),
    "live_fraction": ("live", "{:.2f}"),
    "grad_norm": ("grad", "{:.3g}"),
    "learning_rate": ("lr", "{:.2e}"),
    "tokens_per_second": ("tok/s", "{:,.0f}"),
    "skipped_records": ("skipped", "{:.0f}"),
}
_REFRESH_SECONDS = {True: 0.1, False: 30.0}  # whether stderr is a terminal


def format_line(logs: dict[str, Any], step: int, max_steps: int) -> str | None:
    """One line for a training or evaluation log; None for logs that are neither.

    >>> format_line({"loss": 0.25, "rewards/accuracies": 0.8125, "epoch": 1.0}, 20, 300)
    'step  20/300  loss 0.2500  accuracy 0.812'
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
        f"{label} {form.format(values[key])}"
        for key, (label, form) in _COLUMNS.items()
        if isinstance(values.get(key), (int, float))
    ]
    return "  ".join([head, *shown])


class RankProgress(ProgressCallback):
    """The bar and the lines; without a bar (``--disable_tqdm``) the lines alone."""

    def __init__(self, disable_bar: bool | None = False) -> None:
        super().__init__()
        self.disable_bar = bool(disable_bar)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self.current_step = state.global_step
        if state.is_world_process_zero and not self.disable_bar:
            self.training_bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                dynamic_ncols=True,
                unit="step",
                mininterval=_REFRESH_SECONDS[sys.stderr.isatty()],
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.training_bar is not None:
            self.training_bar.update(state.global_step - self.current_step)
        self.current_step = state.global_step

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        if not self.disable_bar and sys.stderr.isatty():
            super().on_prediction_step(args, state, control, eval_dataloader, **kwargs)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        line = format_line(logs or {}, state.global_step, state.max_steps)
        if line is None or not state.is_world_process_zero:
            return
        if self.training_bar is not None:
            self.training_bar.write(line)
        else:
            print(line, flush=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.training_bar is not None:
            self.training_bar.close()
        self.training_bar = None
