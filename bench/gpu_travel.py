"""Prepare the folder that travels to a machine with a GPU and without a network, and print the
commands to run there.

    python -m bench.gpu_travel [--folder travel]

The machine gets a copy of the checkout and, beside it, this folder: ``peers/`` with the packages of
the peers, installed for its Python, and an archive of what QuACK and Liger's Hopper path need. It
is larger than the 64 MiB which may travel at once: its first part goes along with the peers, the
second with the call that unpacks both, outside the tree. Every call writes into ``$OUT``; the last
command merges what came back.

``--dry_run`` downloads nothing and prints the same commands for the suite's dry run on a CPU;
``--workloads`` measures some alone.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from bench.goals import HOPPER, QUACK
from bench.gpu_suite import UNITS

ROOT = Path(__file__).resolve().parents[1]
PYTHON = "3.12"
PLATFORMS = (
    "manylinux_2_28",
    "manylinux_2_27",
    "manylinux_2_24",
    "manylinux_2_17",
    "manylinux2014",
)
LIMIT = 64 << 20
"""Bytes that may travel with one call, the checkout included."""

# Pinned, and without what they ask for: torch and the rest of it is on the machine.
PEERS = (
    "liger-kernel==0.8.5", "cut-cross-entropy==25.1.1", "trl==1.16.0", "datasets==5.2.0",
    "dill==0.4.1", "multiprocess==0.70.19", "xxhash==4.1.0",
)  # fmt: skip
CUTLASS = (
    "liger-kernel==0.8.5", "quack-kernels==0.6.5", "apache-tvm-ffi==0.1.15.post2",
    "torch-c-dlpack-ext==0.1.5", "einops==0.8.2", "nvidia-cutlass-dsl==4.8.1",
    "nvidia-cutlass-dsl-libs-base==4.8.1", "nvidia-cutlass-dsl-libs-core==4.8.1",
    "nvidia-cutlass-dsl-libs-cu13==4.8.1",
)  # fmt: skip
PARTS = ("cutlass.part0", "cutlass.part1")
_PART = 40 << 20
_UNUSED = ("__pycache__", "tests", "*.dist-info", "stubs", "bin")
_UNPACKED = "${TMPDIR:-/tmp}/fastrank-peers"


class Call(NamedTuple):
    """One command for the machine, what it carries beside the checkout, and how long it takes."""

    name: str
    carries: tuple[str, ...]
    seconds: int
    command: str


def calls(
    folder: str, commit: str, dry_run: bool = False, workloads: Sequence[str] = ()
) -> list[Call]:
    """The commands, in their order; ``folder`` as the machine sees it."""
    suite = f"python3 -m bench.gpu_suite --output $OUT --commit {commit}"
    if workloads:
        suite += f" --workloads {' '.join(workloads)}"
    if dry_run:
        suite += " --dry_run"
    path = "PYTHONPATH=.:kernels/torch-ext"
    peers, first, last = (shlex.quote(f"{folder}/{name}") for name in ("peers", *PARTS))
    keep = f'mkdir -p "{_UNPACKED}" && cp {first} "{_UNPACKED}"'
    unpack = f'cat "{_UNPACKED}/{PARTS[0]}" {last} | tar -xJf - -C "{_UNPACKED}"'
    cutlass = f'"{_UNPACKED}":"{_UNPACKED}/nvidia_cutlass_dsl/dsl_packages"'
    only = " ".join(shlex.quote(name) for name in (HOPPER, QUACK))
    measure_peers = f"{path}:{peers} {suite} --stages peers --budget 280"
    measure_cutlass = f"{path}:{cutlass} {suite} --stages peers --only {only} --budget 150"
    if dry_run:  # there is no archive
        return [
            Call("own", (), 300, f"{path} {suite} --stages own kernels"),
            Call("tests", (), 240, f"{path} {suite} --stages tests"),
            Call("peers", (), 300, measure_peers),
        ]
    return [
        Call("own", (), 300, f"{path} {suite} --stages own kernels --budget 280"),
        Call("tests", (), 240, f"{path} {suite} --stages tests --budget 230"),
        Call("peers", ("peers", PARTS[0]), 300, f"{keep} && {measure_peers}"),
        Call("cutlass", (PARTS[1],), 200, f"set -o pipefail; {unpack} && {measure_cutlass}"),
    ]


def merge_command(dry_run: bool = False) -> str:
    """The command that merges the calls' files, for this machine."""
    came = " ".join(call.name for call in calls("", "", dry_run))
    merged = f"python3 -m bench.gpu_suite --stages --include {came} --output bench/results"
    return merged + (" --dry_run" if dry_run else "")


def prepare(folder: Path) -> None:
    """Download the packages and lay the folder out anew.

    Raises:
        SystemExit: pip could not get a package.
    """
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    _install(PEERS, folder / "peers")
    with tempfile.TemporaryDirectory() as scratch:
        packages, packed = Path(scratch) / "packages", Path(scratch) / "cutlass.tar.xz"
        _install(CUTLASS, packages)
        with tarfile.open(packed, "w:xz") as archive:
            for path in sorted(packages.iterdir()):
                archive.add(path, path.name)
        data = packed.read_bytes()
    (folder / PARTS[0]).write_bytes(data[:_PART])
    (folder / PARTS[1]).write_bytes(data[_PART:])


def _install(packages: tuple[str, ...], target: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", f"--python-version={PYTHON}", "--implementation=cp"]
    command += [f"--platform={name}_x86_64" for name in PLATFORMS]
    done = subprocess.run([*command, f"--target={target}", *packages])
    if done.returncode:
        raise SystemExit(f"gpu_travel: error: pip could not install {', '.join(packages)}")
    for pattern in _UNUSED:
        for path in list(target.rglob(pattern)):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)


def travelling(carried: Iterable[Path]) -> int:
    """Bytes that a call takes along: the checkout's files that git does not ignore, and what it
    carries."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        check=True,
    )
    files = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    for path in carried:
        files += path.rglob("*") if path.is_dir() else [path]
    return sum(path.stat().st_size for path in files if path.is_file() and not path.is_symlink())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--folder", default="travel", help="in the checkout, and ignored by git")
    parser.add_argument("--dry_run", "--dry-run", action="store_true")
    parser.add_argument("--workloads", nargs="+", default=[], help="default: all", metavar="NAME",
                        choices=[unit.workload for unit in UNITS])  # fmt: skip
    options = parser.parse_args()
    folder = ROOT / options.folder
    ignored = subprocess.run(["git", "-C", str(ROOT), "check-ignore", "-q", str(folder / "peers")])
    if ignored.returncode or Path(options.folder).is_absolute():
        print(
            f"gpu_travel: error: --folder must be ignored by git, got {options.folder}",
            file=sys.stderr,
        )
        return 2
    head = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True
    )
    if not options.dry_run:
        prepare(folder)
    too_large = False
    commit = head.stdout.strip() or "unknown"
    for call in calls(options.folder, commit, options.dry_run, options.workloads):
        size = travelling(folder / name for name in call.carries)
        too_large |= size > LIMIT
        carry = ", ".join(f"{options.folder}/{name}" for name in call.carries)
        carry = f"; carry {carry}" if carry else ""
        print(f"# {call.name}: at most {call.seconds} s, {size / 2**20:.1f} MiB travel{carry}")
        print(call.command)
    print("# merge, here, with each call's files in a folder of its name")
    print(merge_command(options.dry_run))
    if too_large:
        print(f"gpu_travel: error: expected at most {LIMIT >> 20} MiB a call", file=sys.stderr)
    return int(too_large)


if __name__ == "__main__":
    sys.exit(main())
