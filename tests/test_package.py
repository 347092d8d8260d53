"""The wheel's contents, lazy imports, and the package as a command."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "fastrank").rglob("*.py"))
KERNELS = ROOT / "kernels" / "torch-ext" / "fastrank_kernels"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names in the wheel, built from a copy so that the checkout stays clean."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    for name in ("fastrank", "kernels", "tests", "bench"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    out = copy / "out"
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, copy],
        check=True,
        capture_output=True,
    )
    (path,) = out.glob("*.whl")
    return zipfile.ZipFile(path).namelist()


def test_the_wheel_holds_both_packages_and_nothing_else(wheel) -> None:
    tops = {name.split("/")[0] for name in wheel}
    (dist_info,) = (top for top in tops if top.endswith(".dist-info"))
    assert tops == {"fastrank", "fastrank_kernels", dist_info}
    for source in SOURCES:
        assert source.relative_to(ROOT).as_posix() in wheel
    for source in KERNELS.glob("*.py"):
        assert f"fastrank_kernels/{source.name}" in wheel
    assert {"fastrank/py.typed", "fastrank_kernels/py.typed"} <= set(wheel)
    for config in (ROOT / "fastrank").rglob("*.yaml"):
        assert config.relative_to(ROOT).as_posix() in wheel
    assert any(name.endswith("licenses/LICENSE") for name in wheel)


def test_no_python_file_lies_directly_in_kernels() -> None:
    # A kernels/__init__.py would shadow the package of that name, which transformers imports.
    assert not list((ROOT / "kernels").glob("*.py"))


def test_importing_the_library_imports_nothing_heavy() -> None:
    code = (
        "import sys, fastrank, fastrank.cli.main;"
        "heavy = {'torch', 'transformers', 'triton', 'matplotlib', 'datasets', 'numpy'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr


def test_every_public_name_exists() -> None:
    import fastrank

    for name in fastrank.__all__:
        assert getattr(fastrank, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        fastrank.nonsense  # noqa: B018


def test_the_module_runs_as_the_command_does() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fastrank", "trian"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2
    assert "train" in done.stderr and done.stderr.count("\n") == 1
