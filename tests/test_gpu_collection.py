"""The GPU's tests where PyTorch, transformers and pytest are installed, and little else."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench.gpu_suite import TESTS

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[1]
# The extras, what only the development tools bring, and their pytest plugins.
ABSENT = (
    "datasets", "accelerate", "peft", "matplotlib", "sacrebleu", "trl", "liger_kernel",
    "hypothesis", "scipy", "pytest_benchmark", "build", "mypy",
)  # fmt: skip
COLLECT = f"""
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, *rest):
        absent = name.partition(".")[0] in {ABSENT}
        return None if absent else self.finder.find_spec(name, *rest)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


def collect(*paths: str) -> tuple[int, str]:
    """Collect the tests marked gpu without the packages of `ABSENT`."""
    command = [sys.executable, "-c", COLLECT, "--collect-only", "-q", "-m", "gpu"]
    command += ["-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib --strict-markers"]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    done = subprocess.run(
        [*command, *paths], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


def test_every_gpu_test_is_collected_with_little_installed():
    code, output = collect(*TESTS)
    assert code == 0, output[-3000:]
    files = {line.partition("::")[0] for line in output.splitlines() if "::" in line}
    contracts = set((ROOT / "tests" / "kernels" / "contracts").glob("test_*.py"))
    expected = contracts | set((ROOT / "tests" / "gpu").glob("test_*.py"))
    assert files == {str(path.relative_to(ROOT)) for path in expected}


def test_a_missing_package_would_be_seen(tmp_path):
    path = tmp_path / "test_of_training.py"
    path.write_text("import accelerate, pytest\n@pytest.mark.gpu\ndef test_x(): pass\n")
    code, output = collect(str(path))
    assert code != 0 and "No module named 'accelerate'" in output


def test_no_other_file_holds_gpu_tests():
    """Elsewhere a folder's ``conftest.py`` may import what the machine does not have."""
    marked = re.compile(r"\bmark\.gpu\b")
    paths = [path for path in (ROOT / "tests").rglob("*.py") if path != Path(__file__)]
    found = {path.parent.relative_to(ROOT) for path in paths if marked.search(path.read_text())}
    assert found == {Path("tests/gpu"), Path("tests/kernels/contracts")}
