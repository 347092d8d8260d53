"""Rules of the kernel project: its imports, its layout, importing it without triton."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "kernels"
PACKAGE = KERNELS / "torch-ext" / "fastrank_kernels"
FILES = sorted(PACKAGE.rglob("*.py"))
ALLOWED = {*sys.stdlib_module_names, "torch", "triton"}


def imported(path: Path) -> set[str]:
    """Top-level names of the absolute imports of a file; ``.`` for relative ones."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." if node.level else (node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_imports_only_the_standard_library_torch_and_triton(path: Path) -> None:
    assert imported(path) <= {*ALLOWED, "."}


def test_relative_imports_stay_inside_the_package() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                depth = len(path.relative_to(PACKAGE).parts)
                assert node.level <= depth, f"{path.name} imports from outside the package"


def test_the_folder_itself_holds_no_python() -> None:
    """A ``kernels/__init__.py`` would shadow the package ``kernels`` that transformers imports."""
    assert len(FILES) > 10
    assert not list(KERNELS.glob("*.py"))
    assert {path.name for path in (KERNELS / "torch-ext").iterdir()} >= {"fastrank_kernels"}


def test_the_hub_project_names_its_package() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11")
    project = tomllib.loads((KERNELS / "build.toml").read_text())
    general = project["general"]
    assert general["name"].replace("-", "_") == PACKAGE.name
    assert set(general["backends"]) == {"cuda", "rocm"}
    assert "torch-noarch" in project
    card = (KERNELS / "CARD.md").read_text()
    assert card.startswith("---\nlibrary_name: kernels\n") and general["license"] == "Apache-2.0"


def test_the_package_imports_without_triton() -> None:
    program = (
        "import sys; sys.modules['triton'] = None; import torch, fastrank_kernels as k; "
        "assert k.choose_backend(None, torch.device('cpu'))[0] == 'torch'; "
        "print(sorted(m for m in sys.modules if m.startswith('fastrank_kernels.')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=PACKAGE.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert ".reference'" in done.stdout
    assert ".triton_backend'" not in done.stdout and ".rank_kernel'" not in done.stdout


def test_the_backend_has_the_functions_of_the_reference() -> None:
    pytest.importorskip("triton")
    import inspect

    from fastrank_kernels import reference, triton_backend

    assert len(triton_backend.__all__) == 8
    for name in triton_backend.__all__:
        ours = inspect.signature(getattr(triton_backend, name))
        theirs = inspect.signature(getattr(reference, name))
        assert ours == theirs, name
