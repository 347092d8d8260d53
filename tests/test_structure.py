"""The shape of the two packages: directions of import, no circles, one name for one thing."""

from __future__ import annotations

import ast
import graphlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "fastrank": ROOT / "fastrank",
    "fastrank_kernels": ROOT / "kernels" / "torch-ext" / "fastrank_kernels",
}

LAYERS = [  # a room imports only from itself, from rooms of its line and from those below
    {"cli"},
    {"workflow", "benchmarks"},
    {"training", "tasks", "visual"},
    {"modeling", "data", "attention"},
    {"linear_loss", "ranking", "logprobs", "metrics", "losses", "outputs", "arguments", "options"}
    | {"loss", "function_loss"},
    {"errors", "hf_private", "console"},
    {"fastrank_kernels"},
]


def _paths() -> Iterator[tuple[str, Path]]:
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = (package, *path.relative_to(folder).with_suffix("").parts)
            yield ".".join(parts).removesuffix(".__init__"), path


PATHS = dict(_paths())
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in PATHS.items()}


def _nodes(tree: ast.AST, typing: bool) -> Iterator[ast.AST]:
    """All nodes, those inside functions too; those under TYPE_CHECKING only if ``typing``."""
    for node in ast.iter_child_nodes(tree):
        checking = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if typing or not checking:
            yield node
            yield from _nodes(node, typing)


def imported_modules(module: str, *, typing: bool) -> set[str]:
    """Modules of the two packages that a module imports, anywhere in its text."""
    package = module.split(".")
    if PATHS[module].stem != "__init__":
        package.pop()
    found = set()
    for node in _nodes(TREES[module], typing):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *filter(None, [node.module])])
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= {name if name in TREES else base for name in names}
    return found & TREES.keys()


def room(module: str) -> str:
    """The part of the tree that a layer names: ``fastrank.data.files`` is in ``data``."""
    first, *rest = module.split(".")
    return rest[0] if first == "fastrank" and rest else first


def test_dependencies_point_one_way() -> None:
    level = {room: i for i, rooms in enumerate(LAYERS) for room in rooms}
    entries = {"fastrank", "fastrank.__main__"}  # these may name everything
    assert {room(module) for module in TREES.keys() - entries} == level.keys()
    upwards = [
        f"{module} imports {other}"
        for module in TREES.keys() - entries
        for other in imported_modules(module, typing=True) - entries
        if level[room(other)] < level[room(module)]
    ]
    assert not upwards


def test_imports_form_no_circle() -> None:
    graph = {module: imported_modules(module, typing=False) for module in TREES}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        raise AssertionError(" imports ".join(reversed(error.args[1]))) from None


def _repeated(named: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Names that occur in several modules, with these modules."""
    homes = defaultdict(list)
    for name, module in named:
        homes[name].append(module)
    return {name: modules for name, modules in homes.items() if len(modules) > 1}


def test_every_public_class_has_a_name_of_its_own() -> None:
    assert not _repeated(
        (node.name, module)
        for module, tree in TREES.items()
        for node in tree.body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )


def test_every_module_has_a_name_of_its_own() -> None:
    modules = [module for module in TREES if not module.endswith("__main__")]
    assert not _repeated((module.rpartition(".")[2], module) for module in modules)


def test_the_package_stays_small() -> None:
    assert len(list(PACKAGES["fastrank"].rglob("*.py"))) <= 157


def test_the_map_names_every_room_and_nothing_else() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    (text,) = re.findall(r"^## Map of the code.*?^```\n(.*?)^```", page, re.S | re.M)
    folder, named = ROOT, {}
    for line in text.splitlines():
        if not line.startswith(" "):  # folders, and beside them what is in them
            folder = ROOT / line.split()[0]
            assert all((ROOT / name).is_dir() for name in re.findall(r"\S+/(?= )", line))
            continue
        names = re.match(r" +((?:[\w*]+(?:\.py|/) ?)+)", line)
        assert names, line
        found = [[path.name for path in folder.glob(name)] for name in names[1].split()]
        assert all(found), line
        named.setdefault(folder, set()).update(name for some in found for name in some)
    for folder, names in named.items():
        rooms = {path.name for path in folder.iterdir() if "__" not in path.name}
        assert names == rooms - {"py.typed"}, folder
    assert len(named) == 2
