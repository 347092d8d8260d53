"""Provenance of a figure: columns of every recorded row."""

from __future__ import annotations

import datetime
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import fastrank

_PACKAGES = ("torch", "triton", "transformers", "liger-kernel", "cut-cross-entropy", "trl")


def provenance(device: torch.device) -> dict[str, str]:
    """Device, threads, versions, commit and date (UTC)."""
    return {
        "device_name": device_name(device),
        "threads": str(torch.get_num_threads()),
        "versions": " ".join(f"{name}={number}" for name, number in _versions().items()),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M"),
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    except OSError:  # no Linux: the platform's own word serves
        pass
    return f"{name}, {torch.get_num_threads()} threads"


def _versions() -> dict[str, str]:
    found = {"fastrank": fastrank.__version__}  # a checkout need not be installed
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            pass
    return {**found, "python": platform.python_version()}


def _commit() -> str:
    """The checkout's commit, with ``+`` for uncommitted changes of tracked files other than those
    that benchmarks write; empty outside one."""
    head = _git("rev-parse", "--short=12", "HEAD")
    if not head:
        return ""
    written = (":(exclude)bench/results", ":(exclude)README.md", ":(exclude)docs")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", *written)
    return head + ("+" if changed else "")


def _git(*arguments: str) -> str:
    root = Path(__file__).resolve().parents[2]
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
    except OSError:  # no git on this machine
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
