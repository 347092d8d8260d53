"""Checkpoints that are whole or not there.

A checkpoint is written into a staging folder, every file is flushed to the disk, a list of the
files with their sizes and checksums is added, and only then does a rename give the folder its name.
Whatever kills the run leaves at worst a staging folder, which the next start removes. A folder that
has the name of a checkpoint but not the bytes of its list (an interrupted copy, a disk that lost
its tail or a bit) is skipped with a warning when the latest one is looked for. The list covers
itself too, so that nothing in a checkpoint is believed that was not written by a run.

transformers writes checkpoints in place and takes the highest number for the latest; a run
killed while writing then resumes from a broken folder, or cannot resume at all.

One run at a time writes a folder (`fastrank.data.locks`). Where the system has no locks, the names
of staging folders, which tell host and process, keep two runs from removing each other's.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import re
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.trainer import safe_globals

from fastrank.data.manifest import (
    damaged_file,
    flush,
    read_sealed,
    write_sealed,
    written_files,
)
from fastrank.errors import InputError, TrainingStopped
from fastrank.options.paths import local_path

logger = logging.getLogger(__name__)

MANIFEST = "checkpoint_files.json"
STAGING = ".staging"
_DISCARDED = ".discarded"
_STAGED_BY = re.compile(rf"{re.escape(STAGING)}-(.+)-(\d+)-[0-9a-f]+")
_NAME = re.compile(r"checkpoint-(\d+)")
_FEW_BYTES = 1 << 20


def checkpoint_name(step: int) -> str:
    return f"checkpoint-{step}"


def find_checkpoints(run_dir: str | Path) -> list[Path]:
    """The folders named like checkpoints, lowest step first."""
    folder = Path(run_dir)
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def latest_checkpoint(run_dir: str | Path) -> Path | None:
    """The undamaged checkpoint with the highest step, or None; all bytes of it have been read. Logs
    a warning for each one skipped."""
    for path in reversed(find_checkpoints(run_dir)):
        problem = damage(path)
        if problem is None:
            return path
        logger.warning("%s is skipped: %s", path, problem)
    return None


def last_good(run_dir: str | Path) -> str:
    """A clause that names the checkpoint to go back to."""
    found = latest_checkpoint(run_dir)
    if found is None:
        return "there is no earlier checkpoint"
    return f"the last good checkpoint is {os.fspath(found)} (--resume_from_checkpoint true)"


def wants_resume(value: str | bool | None) -> bool:
    """Whether ``--resume_from_checkpoint`` asks for a checkpoint: the latest (for "auto", if there
    is one), or a named one."""
    return str(value).strip().lower() not in ("none", "false", "no", "")


def resolve_resume(
    value: str | bool | None,
    run_dir: str | Path,
    *,
    checksums: bool = True,
    gather: Callable[[list[Any]], list[Any]] = list,
) -> Path | None:
    """The checkpoint that ``--resume_from_checkpoint`` means: none, the latest (true), the latest
    if there is one (auto), or a folder.

    With ``auto`` and no checkpoint yet the result is None: a run that is restarted after every
    failure has to start the first time, too. The folders of several processes may be on different
    disks: all of them go on from the latest step that each has.

    Args:
        checksums: whether this process reads all bytes of it, or looks at its files' sizes only.
        gather: from this process's items to those of all processes, in their order; every process
            must call it.

    Raises:
        InputError: there is no undamaged checkpoint where one is asked for, or some processes have
            checkpoints and others not the same ones.
    """
    if not wants_resume(value):
        return None
    word = str(value).strip().lower()
    latest = word in ("true", "yes", "latest", "auto")
    paths = find_checkpoints(run_dir) if latest else [local_path(str(value))]
    host = socket.gethostname()
    own = {path.name: _refusal(path, checksums=False) for path in paths}
    views: list[tuple[str, dict[str, str | None]]] = gather([(host, own)])
    common = [name for name in own if all(view.get(name, "") is None for _, view in views)]
    chosen = None
    for path in reversed([path for path in paths if path.name in common]):
        own[path.name] = _refusal(path) if checksums else None
        views = gather([(host, own)])
        if all(view[path.name] is None for _, view in views):
            chosen = path
            break
    if not latest and chosen is None:
        raise InputError(f"resume_from_checkpoint: {value} {_refused(paths[0].name, views)}")
    seen = [[name for name, problem in view.items() if problem is None] for _, view in views]
    if chosen is None and any(names != seen[0] for names in seen):
        held = "; ".join(
            f"process {rank} on {views[rank][0]} has {', '.join(seen[rank]) or 'none'}"
            for rank in (0, next(i for i, names in enumerate(seen) if names != seen[0]))
        )
        raise InputError(
            f"resume_from_checkpoint: {run_dir} holds no checkpoint for every process: {held}; let "
            "all machines share the folder, or copy a checkpoint to each"
        )
    for path in reversed(paths):
        if path == chosen:
            break
        problem = own[path.name] or "other processes do not have it undamaged"
        logger.warning("%s is skipped: %s", path, problem.removeprefix("cannot be used: "))
    if chosen is None and word != "auto":
        raise InputError(
            f"resume_from_checkpoint: {os.fspath(run_dir)} holds no "
            f"{'undamaged ' if paths else ''}checkpoint to go on from; auto would begin a new run"
        )
    return chosen


def _refusal(path: Path, *, checksums: bool = True) -> str | None:
    """Why a folder cannot be resumed from, to follow its name; None if it can."""
    if not path.is_dir():
        return "is no folder; expected a checkpoint, true or auto"
    problem = damage(path, checksums=checksums)
    return None if problem is None else f"cannot be used: {problem}"


def _refused(name: str, views: Sequence[tuple[str, Mapping[str, str | None]]]) -> str:
    """What processes say about a checkpoint that at least one of them refuses."""
    problems = [view[name] for _, view in views]
    rank = next(i for i, problem in enumerate(problems) if problem is not None)
    who = f"(process {rank} on {views[rank][0]}; not every process sees the same folder)"
    return f"{problems[rank]}" + (f" {who}" if None in problems else "")


def damage(path: Path, *, checksums: bool = True) -> str | None:
    """What distinguishes a checkpoint folder from what a run wrote, in a few words; None if nothing
    does.

    Args:
        checksums: whether to read all files, or to look at their sizes only.
    """
    manifest = read_manifest(path)
    if manifest is None:
        return f"it has no readable {MANIFEST}, so it was not written to its end"
    return damaged_file(path, manifest["files"], checksums=checksums)


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The list of a checkpoint's files as it was written, with plan and notes; None for anything
    else."""
    return read_sealed(path / MANIFEST)


def read_notes(path: Path) -> dict[str, Any]:
    return (read_manifest(path) or {}).get("notes") or {}


def new_staging_name() -> str:
    """The name of a run's staging folders, which no other run has."""
    return f"{STAGING}-{_host()}-{os.getpid()}-{secrets.token_hex(4)}"


def _host() -> str:
    return re.sub(r"[^\w.]", "_", socket.gethostname())


def begin_staging(run_dir: str | Path, name: str) -> Path:
    """An empty staging folder of this name; remains of saves whose process has ended are removed.

    Raises:
        OSError: it cannot be made.
    """
    clean_staging(run_dir, name)
    remove_remains(run_dir)
    staging = Path(run_dir) / name
    staging.mkdir(parents=True)
    return staging


def clean_staging(run_dir: str | Path, name: str) -> None:
    """Remove this staging folder, and what is left of discarded checkpoints."""
    for folder in (name, _DISCARDED):
        shutil.rmtree(Path(run_dir) / folder, ignore_errors=True)


def remove_remains(run_dir: str | Path, *, alone: bool = False) -> None:
    """Remove the staging folders of processes that have ended.

    Args:
        alone: whether no other run is writing here: then all staging folders.
    """
    for folder in Path(run_dir).glob(f"{STAGING}*"):
        if alone or _has_ended(folder.name):
            shutil.rmtree(folder, ignore_errors=True)


def _has_ended(staging_name: str) -> bool:
    """Whether the process that gave a staging folder its name is known to have ended."""
    named = _STAGED_BY.fullmatch(staging_name)
    if named is None or named[1] != _host() or os.name == "nt":
        return False
    try:
        os.kill(int(named[2]), 0)
    except ProcessLookupError:
        return True
    except OSError:  # another user's
        pass
    return False


def publish(
    staged: Path, run_dir: str | Path, plan: Mapping[str, Any], notes: Mapping[str, Any]
) -> Path:
    """Give a finished staged folder its name in ``run_dir``; arguments as of `write_manifest`."""
    write_manifest(staged, plan, notes)
    for path in (*(path for path in staged.rglob("*") if path.is_dir()), staged):
        flush(path)
    final = Path(run_dir) / staged.name
    if final.exists():  # a broken one that was passed over
        discard(final)
    staged.rename(final)
    flush(final.parent)
    return final


def write_manifest(staged: Path, plan: Mapping[str, Any], notes: Mapping[str, Any]) -> None:
    """Write the list of a checkpoint's files and flush all of them to the disk.

    Args:
        staged: the folder, complete otherwise.
        plan: what determines the run, for a resumed run to be compared with.
        notes: settings for a resumed run to take over.
    """
    files = written_files(staged, [file for file in _files(staged) if file != staged / MANIFEST])
    write_sealed(staged / MANIFEST, {"files": files, "plan": plan, "notes": notes})


def publish_files(staged: Path, target: Path) -> None:
    """Replace the files in ``target`` one by one, each at once whole."""
    target.mkdir(parents=True, exist_ok=True)
    for file in list(_files(staged)):
        flush(file)
        destination = target / file.relative_to(staged)
        destination.parent.mkdir(parents=True, exist_ok=True)
        file.replace(destination)
    flush(target)


def discard(path: Path) -> None:
    """Remove a checkpoint so that a kill on the way leaves none that looks whole."""
    doomed = path.parent / _DISCARDED / path.name
    doomed.parent.mkdir(exist_ok=True)
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed.parent, ignore_errors=True)


def rotate(run_dir: str | Path, limit: int | None, keep: str | None = None) -> None:
    """Remove the oldest checkpoints until ``limit`` are left, never ``keep`` or the newest."""
    if limit is None or limit <= 0:
        return
    paths = find_checkpoints(run_dir)
    spared = {paths[-1]} if paths else set()
    spared |= {path for path in paths if keep is not None and path.samefile(keep)}
    doomed = [path for path in paths if path not in spared]
    for path in doomed[: max(0, len(paths) - max(limit, len(spared)))]:
        discard(path)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


# ---- saving from several processes -----------------------------------------------------------


@dataclass(frozen=True)
class Saver:
    """Saves a folder in two moves: written aside by all processes, then published by one.

    Attributes:
        publishes: whether this process makes and publishes the staging folder.
        wait: returns when every process has called it.
        name: of the staging folders, the same on all processes.
    """

    publishes: bool
    wait: Callable[[], None]
    name: str

    def clean(self, folder: Path, *, alone: bool) -> None:
        """Remove what interrupted saves left in a folder; ``alone`` as of `remove_remains`."""
        if self.publishes:
            clean_staging(folder, self.name)
            remove_remains(folder, alone=alone)
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
            with explained_writing("anything", folder, self.name):
                begin_staging(folder, self.name)
        self.wait()
        staging = folder / self.name
        with explained_writing(what, folder, self.name):
            write(staging)
            self.wait()
            if self.publishes:
                publish(staging)
                clean_staging(folder, self.name)


@contextlib.contextmanager
def explained_writing(what: str, run_dir: Path, staging: str) -> Iterator[None]:
    """Turn a failed write into one line, and leave nothing half-written in the staging folder of
    this name."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = _write_failure(error, run_dir)
        if reason is None:
            raise
        clean_staging(run_dir, staging)
        raise TrainingStopped(
            f"{what} could not be saved in {run_dir}: {reason}; {last_good(run_dir)}"
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
