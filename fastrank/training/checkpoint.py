"""Checkpoints that are whole or not there.

A checkpoint is written into a staging folder, every file is flushed to the disk, a list of the
files and their sizes is added, and only then does a rename give the folder its name. Whatever
kills the run leaves at worst a staging folder, which the next start removes. A folder that has
the name of a checkpoint but lacks files of its list (an interrupted copy, a disk that lost its
tail) is skipped with a warning when the latest one is looked for.

transformers writes checkpoints in place and takes the highest number for the latest; a run
killed while writing then resumes from a broken folder, or cannot resume at all.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastrank.errors import InputError

logger = logging.getLogger(__name__)

MANIFEST = "checkpoint_files.json"
STAGING = ".staging"
_DISCARDED = ".discarded"
_NAME = re.compile(r"checkpoint-(\d+)")


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
    """The whole checkpoint with the highest step, or None. Logs a warning for each one skipped."""
    for path in reversed(find_checkpoints(run_dir)):
        problem = incomplete(path)
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


def resolve_resume(value: str | bool | None, run_dir: str | Path) -> Path | None:
    """The checkpoint that ``--resume_from_checkpoint`` means: none, the latest (true), or a folder.

    With ``true`` and no checkpoint yet the result is None: a run that is restarted after every
    failure has to start the first time, too.

    Raises:
        InputError: the named folder is no whole checkpoint.
    """
    text = str(value).strip().lower() if value is not None else "false"
    if text in ("false", "no", ""):
        return None
    if text in ("true", "yes", "latest"):
        return latest_checkpoint(run_dir)
    path = Path(str(value)).expanduser()
    if not path.is_dir():
        raise InputError(
            f"resume_from_checkpoint: {value} is no folder; expected a checkpoint or true"
        )
    problem = incomplete(path)
    if problem is not None:
        raise InputError(f"resume_from_checkpoint: {path} cannot be used: {problem}")
    return path


def incomplete(path: Path) -> str | None:
    """The reason that a checkpoint folder is not whole, in a few words; None if it is."""
    manifest = read_manifest(path)
    if manifest is None:
        return f"it has no readable {MANIFEST}, so it was not written to its end"
    for name, size in manifest["files"].items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    return None


def read_manifest(path: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        return None
    return manifest


def read_notes(path: Path) -> dict[str, Any]:
    return (read_manifest(path) or {}).get("notes") or {}


def begin_staging(run_dir: str | Path) -> Path:
    """An empty staging folder; remains of an interrupted save are removed."""
    clean_staging(run_dir)
    staging = Path(run_dir) / STAGING
    staging.mkdir(parents=True)
    return staging


def clean_staging(run_dir: str | Path) -> None:
    for name in (STAGING, _DISCARDED):
        shutil.rmtree(Path(run_dir) / name, ignore_errors=True)


def publish(staged: Path, run_dir: str | Path, plan: dict[str, Any], notes: dict[str, Any]) -> Path:
    """Give a finished staged folder its name in ``run_dir``."""
    write_manifest(staged, plan, notes)
    for path in (*_files(staged), staged, *(path for path in staged.rglob("*") if path.is_dir())):
        _sync(path)
    final = Path(run_dir) / staged.name
    if final.exists():  # a broken one that was passed over
        discard(final)
    staged.rename(final)
    _sync(final.parent)
    return final


def write_manifest(staged: Path, plan: dict[str, Any], notes: dict[str, Any]) -> None:
    """Write the list of a checkpoint's files.

    Args:
        staged: the folder, complete otherwise.
        plan: settings that a resumed run must share to train on the same groups.
        notes: settings for a resumed run to take over.
    """
    files = {str(file.relative_to(staged)): file.stat().st_size for file in _files(staged)}
    text = json.dumps({"files": files, "plan": plan, "notes": notes}, indent=1)
    (staged / MANIFEST).write_text(text + "\n", encoding="utf-8")


def publish_files(staged: Path, target: Path) -> None:
    """Replace the files in ``target`` one by one, each at once whole."""
    target.mkdir(parents=True, exist_ok=True)
    for file in list(_files(staged)):
        _sync(file)
        destination = target / file.relative_to(staged)
        destination.parent.mkdir(parents=True, exist_ok=True)
        file.replace(destination)
    _sync(target)


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


def check_same_plan(checkpoint: Path, plan: dict[str, Any]) -> None:
    """Refuse to resume a run whose steps would hold other groups than the checkpoint's did.

    Raises:
        InputError: naming the first setting that differs.
    """
    before = (read_manifest(checkpoint) or {}).get("plan") or {}
    for name, value in plan.items():
        if name in before and before[name] != value:
            raise InputError(
                f"{checkpoint} was written with {name}={before[name]}, got {value}: "
                "resuming would not continue the same run"
            )


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open a folder to flush it
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
