"""Random command lines and YAML files: exit 0, or one line and exit 2; no traceback, no hang."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from menu_files import save_menu_model, write_menu

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_300_command_lines_and_100_yaml_files(tmp_path: Path) -> None:
    folder = tmp_path / "place"
    save_menu_model(folder / "model")
    write_menu(folder / "d.jsonl", 6, seed=3)
    script = ROOT / "tests" / "support" / "fuzz_commands.py"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, str(script), str(folder), "1", "300", "100"], check=True, env=environment
    )
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found) == 400
    wrong = [
        one
        for one in found
        if one["traceback"]
        or one["code"] not in (0, 2)
        or (one["code"] == 2 and (len(one["errors"]) != 1 or one["last"] != one["errors"]))
    ]
    assert not wrong, f"{len(wrong)} of 400, the first: {json.dumps(wrong[:3], indent=1)}"
    assert {one["code"] for one in found} == {0, 2}  # some are in order
