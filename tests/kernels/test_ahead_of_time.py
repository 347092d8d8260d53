"""Every kernel compiles for the GPUs it is meant for, and spills nothing: checked without a GPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("ahead_of_time.py")
TARGETS = {"cuda 80", "cuda 90", "cuda 100", "hip gfx942"}


def compile_cases(subject: str, extent: str, cache: Path) -> list[dict]:
    """The records of `ahead_of_time.py`, compiled afresh in a process that does not interpret."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), subject, extent]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def assert_nothing_spills(records: list[dict]) -> None:
    checked = [r for r in records if r["target"].startswith("cuda")]
    assert checked
    spilled = [r for r in checked if r["stack"] or r["local"]]
    assert not spilled, spilled


def assert_barriers(records: list[dict]) -> None:
    """The loop over the logits is loads, a barrier, stores where it writes over them.

    A program of one wave on AMD needs none, because its loads are waited for before its stores, and
    the compiler leaves it out. A separate buffer goes without, but where a change of layout takes
    one: rows of odd length, and stores narrower than the loads.
    """
    seen = {"in place": 0, "separate": 0}
    for record in records:
        case = re.match(r"dlogits (in place|separate) (\S+) (\S+) V=(\d+) ", record["case"])
        if case is None:
            continue
        in_place, same_dtype, vocab = case[1] == "in place", case[2] == case[3], int(case[4])
        on_nvidia, aligned = record["target"].startswith("cuda"), vocab == 128256
        if not in_place and not aligned:
            continue
        if in_place:
            one_wave = not on_nvidia and vocab <= 256
            barrier = "" if one_wave else "B" if aligned else "B+"
        else:
            barrier = "" if same_dtype else "B*"
        # On NVIDIA the stores of dead rows come first in the text, and the loop comes last.
        last = "$" if on_nvidia else ""
        steps = record["steps"].replace("W", "")
        # The blocks that are whole, and then the last one.
        assert re.search(f"(L+{barrier}S+){{2}}{last}", steps), record
        seen[case[1]] += 1
    assert min(seen.values()) >= 4, seen


def assert_vectorised(records: list[dict]) -> int:
    """Logits are loaded and stored in 16 bytes per thread, whatever divides the vocabulary.

    Where 16 does not divide it, only the last block's bias and the end of a row that nothing wider
    surrounds are taken one by one; without those the program is the same. Returns how many programs
    were compared so.
    """
    programs = {(r["case"], r["target"]): r["accesses"] for r in records if "accesses" in r}
    odd = [key for key in programs if "V=50257" in key[0]]
    compared = 0
    for case, target in odd:
        accesses = programs[case, target]
        assert accesses["ld16"] >= 3 and (accesses.get("st16") or "row_stats" in case), case
        aligned = programs.get((case.replace("V=50257", "V=128256"), target))
        ends_inside = (
            "row_stats",
            "unit in place",
            "dlogits in place torch.bfloat16 torch.float32",
        )
        if aligned and "bias=False" in case and case.startswith(ends_inside):
            assert accesses == aligned, case
            compared += 1
    assert odd
    return compared


@pytest.mark.parametrize("subject", ["rows", "unit", "rank"])
def test_representative_launches(subject: str, tmp_path: Path) -> None:
    records = compile_cases(subject, "few", tmp_path)
    assert {r["target"] for r in records} == TARGETS
    assert_nothing_spills(records)
    registers = max(r["registers"] for r in records if "registers" in r)
    if subject == "rank":
        assert registers <= 128
    if subject == "rows":
        assert_vectorised(records)
        assert_barriers(records)
    if subject == "unit":
        # Three programs of 256 threads on a multiprocessor keep enough loads in flight.
        assert registers <= 80 and assert_vectorised(records) == 3


@pytest.mark.slow
def test_a_sample_of_all_launches(tmp_path: Path) -> None:
    """Spills come where nobody looks for them: other launches than the representative ones."""
    rows, unit, rank = (compile_cases(x, "some", tmp_path) for x in ("rows", "unit", "rank"))
    assert_nothing_spills([*rows, *unit, *rank])
    assert_vectorised(rows)
    assert {r["target"] for r in rows} == {r["target"] for r in rank} == TARGETS


@pytest.mark.exhaustive
@pytest.mark.parametrize("subject", ["rows", "unit", "rank"])
def test_every_launch(subject: str, tmp_path: Path) -> None:
    records = compile_cases(subject, "all", tmp_path)
    assert {r["target"] for r in records} == TARGETS
    assert len(records) > (60 if subject == "unit" else 400)
    assert_nothing_spills(records)
    if subject != "rank":
        assert_vectorised(records)
    if subject == "rows":
        assert_barriers(records)
