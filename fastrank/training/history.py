"""``metrics.jsonl``: one line a log entry, in the order of the run, also across interruptions.

A run that is killed has logged steps that its last checkpoint does not know; resumed, it
repeats them. The file is therefore cut back to the checkpoint's step first, so that it reads as
if nothing had happened.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

METRICS_FILE = "metrics.jsonl"
_FROM_THE_END = ("train_runtime", "total_flos")  # logged once, when training ends


class MetricsFile(TrainerCallback):
    """Appends every log entry to ``<output_dir>/metrics.jsonl`` as it is made."""

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / METRICS_FILE

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        resumed = state.global_step
        kept = [row for row in read_metrics(self.path) if resumed and _belongs(row, resumed)]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(_line(row) for row in kept), encoding="utf-8")
        partial.replace(self.path)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and logs:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line({"step": state.global_step, **logs}))


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


def _belongs(row: dict[str, Any], resumed: int) -> bool:
    return row.get("step", 0) <= resumed and not any(key in row for key in _FROM_THE_END)


def _line(row: dict[str, Any]) -> str:
    # JSON has no NaN: a value that is not finite is written as null.
    clean = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }
    return json.dumps(clean, default=os.fspath) + "\n"
