"""The order of the house: imports run one way, between packages, between folders and between files; no exceptions.

Every import counts, those inside functions and under TYPE_CHECKING too.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "calibration",
    "simulator",
    "analysis",
    "reports",
    "paceline",
    "studies",
)  # each may import those before it

Graph = dict[str, set[str]]


def modules(root: Path, packages: tuple[str, ...] = PACKAGES) -> dict[str, Path]:
    """Every module of `packages` by its dotted name, a package by the name of its folder."""
    found = {}
    for package in packages:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def import_graph(files: Mapping[str, Path]) -> Graph:
    """Which modules each module imports, itself left out; `from package import module` is an import of the module."""

    def resolved(name: str) -> str:
        while name and name not in files:
            name = name.rpartition(".")[0]
        return name

    graph: Graph = {}
    for module, path in files.items():
        names = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative import in line {node.lineno}"
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
        graph[module] = {resolved(name) for name in names} - {module, ""}
    return graph


def folder_graph(files: Mapping[str, Path], graph: Graph) -> Graph:
    """Which folders each folder imports. A package's root holds its front alone, so its ``__init__`` is one too."""
    home = {module: path.parent.as_posix() for module, path in files.items()}
    folders: Graph = {folder: set() for folder in home.values()}
    for module, imported in graph.items():
        folders[home[module]] |= {home[one] for one in imported} - {home[module]}
    return folders


def circle(graph: Graph) -> list[str]:
    """One circle of `graph` in the order of its arrows; empty where there is none."""
    done: set[str] = set()

    def follow(node: str, way: list[str]) -> list[str]:
        if node in way:
            return [*way[way.index(node) :], node]
        if node in done:
            return []
        for following in sorted(graph[node]):
            if found := follow(following, [*way, node]):
                return found
        done.add(node)
        return []

    return next((found for node in sorted(graph) if (found := follow(node, []))), [])


@pytest.fixture(scope="module")
def files() -> dict[str, Path]:
    return modules(ROOT)


@pytest.fixture(scope="module")
def graph(files: dict[str, Path]) -> Graph:
    return import_graph(files)


def test_packages_import_only_those_before_them(graph: Graph) -> None:
    rank = {package: index for index, package in enumerate(PACKAGES)}
    upward = [
        f"{module} -> {imported}"
        for module, names in graph.items()
        for imported in names
        if rank[imported.partition(".")[0]] > rank[module.partition(".")[0]]
    ]
    assert upward == []


def test_no_folders_import_each_other(files: dict[str, Path], graph: Graph) -> None:
    assert circle(folder_graph(files, graph)) == []


def test_no_files_import_each_other(graph: Graph) -> None:
    assert circle(graph) == []


def test_a_circle_is_found(tmp_path: Path) -> None:
    """The fence itself: two folders that import each other through different files, once under TYPE_CHECKING."""
    for path, text in {
        "house/__init__.py": "",
        "house/low/__init__.py": "",
        "house/low/a.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from house.high import b\n",
        "house/low/c.py": "",
        "house/high/__init__.py": "",
        "house/high/b.py": "def late() -> None:\n    import house.low.c\n",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    files = modules(tmp_path, ("house",))
    graph = import_graph(files)
    assert graph["house.low.a"] == {"house.high.b"}
    assert graph["house.high.b"] == {"house.low.c"}
    assert circle(graph) == []
    assert [Path(folder).name for folder in circle(folder_graph(files, graph))] == ["high", "low", "high"]


def test_the_page_on_architecture_names_what_is_there() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:[a-z_]+/)+[a-z_]*(?:\.py)?|(?:[a-z_]+/)+[a-z_*]+\.py)`", page))
    assert len(named) > 20
    assert [name for name in sorted(named) if not list(ROOT.glob(name))] == []
    for package in PACKAGES[:4]:
        told = page.split(f"`{package}`: ")[1].split("\n\n")[0]
        folders = {path.parent.name for path in (ROOT / package).glob("*/__init__.py")}
        assert set(re.findall(r"\*\*(\w+)\*\*", told)) == folders - {"prompts"}, package
