"""A ``Trainer`` whose folders are never half-written and which resumes from the last whole one."""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch.distributed.tensor import DTensor
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME, safe_globals

from fastrank.errors import InputError
from fastrank.training import checkpoint
from fastrank.training.failures import TrainingStopped

_FEW_BYTES = 1 << 20


class StagedTrainer(Trainer):
    """Saves through a staging folder, refuses to save spoilt weights, and resumes exactly.

    See `fastrank.training.checkpoint` for the scheme. ``training_args.bin``, a pickle that
    transformers writes and nothing reads, is replaced by ``training_args.json``.
    """

    _staging: Path | None = None

    def run_plan(self) -> dict[str, Any]:
        """What has to be the same for a checkpoint's step number to mean the same place in the
        data."""
        return {}

    def run_notes(self) -> dict[str, Any]:
        """What a resumed run may want to know of the one that wrote the checkpoint."""
        return {}

    def before_training(self, notes: dict[str, Any] | None) -> None:
        """Called before anything is prepared; ``notes`` are those of the checkpoint, if any."""

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As ``Trainer.train``; ``True`` or ``"true"`` resumes from the latest whole checkpoint, or
        starts anew if there is none yet."""
        run_dir = Path(self.args.output_dir or ".")
        found = checkpoint.resolve_resume(resume_from_checkpoint, run_dir)
        if found is not None:
            checkpoint.check_same_plan(found, self.run_plan())
        if self.args.should_save:
            checkpoint.clean_staging(run_dir)
        self.accelerator.wait_for_everyone()
        self.before_training(None if found is None else checkpoint.read_notes(found))
        if found is None:
            return super().train(None, *args, **kwargs)
        try:
            return super().train(str(found), *args, **kwargs)
        except pickle.UnpicklingError as error:  # torch loads tensors and plain values only
            raise InputError(f"{found} cannot be loaded: {_unpicklable(found)}") from error

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Resumed from a checkpoint of the last step, transformers would train one step more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    # ---- checkpoints ---------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        run_dir = Path(self._get_output_dir(trial))
        name = checkpoint.checkpoint_name(self.state.global_step)
        self._refuse_spoilt_weights(run_dir)
        self._staging = self._begin_staging(run_dir)
        try:
            with self._explained(name, run_dir):
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    self._settle_best(self._staging / name, run_dir)
                    checkpoint.publish(
                        self._staging / name, run_dir, self.run_plan(), self.run_notes()
                    )
                    checkpoint.clean_staging(run_dir)
        finally:
            self._staging = None
        if self.args.should_save:
            checkpoint.rotate(run_dir, self.args.save_total_limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run_dir / name))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is None:  # otherwise the folder is about to be renamed
            super()._push_from_checkpoint(checkpoint_folder)

    def _settle_best(self, staged: Path, run_dir: Path) -> None:
        """The best checkpoint's path as it will be after the rename."""
        if self.state.best_model_checkpoint == str(staged):
            self.state.best_model_checkpoint = str(run_dir / staged.name)
            self.state.save_to_json(str(staged / TRAINER_STATE_NAME))

    def _begin_staging(self, run_dir: Path) -> Path:
        if self.args.should_save:
            with self._explained("anything", run_dir):
                checkpoint.begin_staging(run_dir)
        self.accelerator.wait_for_everyone()
        return run_dir / checkpoint.STAGING

    def _refuse_spoilt_weights(self, run_dir: Path) -> None:
        bad = [
            name
            for name, parameter in self.accelerator.unwrap_model(self.model).named_parameters()
            if parameter.is_floating_point() and not _all_finite(parameter)
        ]
        found = bad if self.args.world_size == 1 else list(gather_object(bad))
        if found:
            raise TrainingStopped(
                f"{len(set(found))} weights are not finite after step {self.state.global_step} "
                f"(the first is {found[0]}), so no checkpoint is written; lower the learning rate; "
                f"{last_good(run_dir)}"
            )

    # ---- the final model -----------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save model and tokenizer for ``from_pretrained``; every file is replaced at once."""
        if _internal_call:
            super().save_model(output_dir, _internal_call=True)
            return
        target = Path(output_dir or self.args.output_dir or ".")
        self._refuse_spoilt_weights(target)
        if self.is_fsdp_enabled:  # shards alone would leave no model for from_pretrained
            self.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        staging = self._begin_staging(target)
        with self._explained("the model", target):
            super().save_model(str(staging / "model"), _internal_call=True)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                checkpoint.publish_files(staging / "model", target)
                checkpoint.clean_staging(target)
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir or ".")
        if self.args.should_save:
            (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
            text = self.args.to_json_string()
            (folder / TRAINING_ARGS_NAME).with_suffix(".json").write_text(text, encoding="utf-8")

    @contextlib.contextmanager
    def _explained(self, what: str, run_dir: Path) -> Iterator[None]:
        """Turns a failed write into one line, and leaves nothing half-written."""
        try:
            yield
        except (OSError, SafetensorError, RuntimeError) as error:
            reason = write_failure(error, run_dir)
            if reason is None:
                raise
            checkpoint.clean_staging(run_dir)
            raise TrainingStopped(
                f"{what} could not be saved in {run_dir}: {reason}; {last_good(run_dir)}"
            ) from error


def write_failure(error: BaseException, folder: Path) -> str | None:
    """Why a write failed, in a few words; None if the error is about something else."""
    if isinstance(error, TrainingStopped):
        return None
    # torch reports a failed write as a RuntimeError of its archive writer, without a reason.
    if isinstance(error, RuntimeError) and not any(
        word in str(error) for word in ("PytorchStreamWriter", "inline_container", "writing")
    ):
        return None
    free = shutil.disk_usage(folder if folder.exists() else folder.parent).free
    if free < _FEW_BYTES or "os error 28" in str(error) or getattr(error, "errno", None) == 28:
        return f"no space left on the device ({free / 1e6:.1f} MB free)"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:200]


def last_good(run_dir: Path) -> str:
    """A clause that names the checkpoint to go back to."""
    found = checkpoint.latest_checkpoint(run_dir)
    if found is None:
        return "there is no earlier checkpoint"
    return f"the last good checkpoint is {os.fspath(found)} (--resume_from_checkpoint true)"


def _unpicklable(folder: Path) -> str:
    for file in sorted((*folder.glob("*.pt"), *folder.glob("*.pth"))):
        try:
            with safe_globals():
                torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            return f"{file.name} holds other things than tensors and plain values"
    return "a file holds other things than tensors and plain values"


def _all_finite(parameter: torch.Tensor) -> bool:
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return bool(local.detach().isfinite().all())
