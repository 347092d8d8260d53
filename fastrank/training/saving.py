"""Saving from several processes through a staging folder, with one-line errors.

See `fastrank.training.checkpoint` for the scheme.
"""

from __future__ import annotations

import contextlib
import pickle
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers.trainer import safe_globals

from fastrank.errors import InputError, TrainingStopped
from fastrank.training import checkpoint

_FEW_BYTES = 1 << 20


@dataclass(frozen=True)
class Saver:
    """Saves a folder in two moves: written aside by all processes, then published by one.

    Attributes:
        publishes: whether this process makes and publishes the staging folder.
        wait: returns when every process has called it.
    """

    publishes: bool
    wait: Callable[[], None]

    def clean(self, folder: Path) -> None:
        """Remove what an interrupted save left in a folder."""
        if self.publishes:
            checkpoint.clean_staging(folder)
        self.wait()

    def save(
        self,
        what: str,
        folder: Path,
        write: Callable[[Path], None],
        publish: Callable[[Path], object],
    ) -> None:
        """Every process must call it.

        Args:
            what: for messages, e.g. ``"the model"``.
            folder: to save in.
            write: called with the staging folder on every process.
            publish: called with it on one process, when all have written.

        Raises:
            TrainingStopped: the disk is full, or something else cannot be written.
        """
        if self.publishes:
            with explained_writing("anything", folder):
                checkpoint.begin_staging(folder)
        self.wait()
        staging = folder / checkpoint.STAGING
        with explained_writing(what, folder):
            write(staging)
            self.wait()
            if self.publishes:
                publish(staging)
                checkpoint.clean_staging(folder)


@contextlib.contextmanager
def explained_writing(what: str, run_dir: Path) -> Iterator[None]:
    """Turn a failed write into one line, and leave nothing half-written."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = _write_failure(error, run_dir)
        if reason is None:
            raise
        checkpoint.clean_staging(run_dir)
        raise TrainingStopped(
            f"{what} could not be saved in {run_dir}: {reason}; {checkpoint.last_good(run_dir)}"
        ) from error


@contextlib.contextmanager
def explained_loading(folder: Path | None) -> Iterator[None]:
    """Turn the refusal of torch to unpickle a checkpoint's file into one line that names it."""
    try:
        yield
    except pickle.UnpicklingError as error:  # torch loads tensors and plain values only
        if folder is None:
            raise
        raise InputError(f"{folder} cannot be loaded: {_unpicklable(folder)}") from error


def _write_failure(error: BaseException, folder: Path) -> str | None:
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


def _unpicklable(folder: Path) -> str:
    for file in sorted((*folder.glob("*.pt"), *folder.glob("*.pth"))):
        try:
            with safe_globals():
                torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            return f"{file.name} holds other things than tensors and plain values"
    return "a file holds other things than tensors and plain values"
