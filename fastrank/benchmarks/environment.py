"""What a figure was measured on and with: columns of every row."""

from __future__ import annotations

import datetime
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

_PACKAGES = ("torch", "triton", "transformers", "liger-kernel", "cut-cross-entropy", "trl")


def describe(device: torch.device) -> dict[str, str]:
    """Device, threads, versions, commit and date (UTC)."""
    found = {name: number for name in _PACKAGES if (number := _version(name))}
    return {
        "device_name": device_name(device),
        "threads": str(torch.get_num_threads()),
        "versions": " ".join(
            f"{name}={number}" for name, number in {"fastrank": _own_version(), **found}.items()
        )
        + f" python={platform.python_version()}",
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M"),
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's with its number of cores."""
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


def commit() -> str:
    """The checkout's commit, with ``+`` for uncommitted changes of tracked files other than what
    benchmarks write; empty outside one."""
    root = Path(__file__).resolve().parents[2]
    head = _git(root, "rev-parse", "--short=12", "HEAD")
    if not head:
        return ""
    written = (":(exclude)bench/results", ":(exclude)README.md")
    changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", ".", *written)
    return head + ("+" if changed else "")


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
    except OSError:  # no git on this machine
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _own_version() -> str:
    import fastrank

    return fastrank.__version__
