"""The rules of "How it is built" in CONTRIBUTING, read from the source files themselves."""

from __future__ import annotations

import ast
import graphlib
from collections import Counter
from pathlib import Path

import pytest

LAYERS = [
    {"errors", "files", "metrics", "config", "runtime", "download", "web", "terms"},
    {"geo", "models"},
    {"imagery", "labels", "synth"},
    {"chips", "inference", "evaluation"},
    {"training", "calibration"},
    {"region"},
    {"cli", "viewer"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
# Rules that the ranks alone do not say.
FORBIDDEN = {("evaluation", "models"), ("training", "evaluation"), ("models", "geo")}
MOST_MODULES = 12
PACKAGE = Path(__file__).resolve().parent.parent / "canopy"
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


def imported(path: Path) -> set[str]:
    """The canopy modules that a file imports anywhere, function bodies included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return {name for name in found if name in MODULES and name != "canopy"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_downward(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own in ("__init__", "__main__", "data"):
        return  # the public API exports from every layer, and `python -m canopy` is the command line
    for part in {name.split(".")[1] for name in imported(path)} - {own}:
        assert (own, part) not in FORBIDDEN, f"{path.name} may not import canopy.{part}"
        assert RANK[part] <= RANK[own], f"canopy.{own} is below canopy.{part} and may not import it"


def test_no_circle_between_files() -> None:
    edges = {name: imported(path) - {name} for name, path in MODULES.items()}
    graphlib.TopologicalSorter(edges).prepare()  # CycleError names the files of a circle


def test_folders_are_small() -> None:
    counts = Counter(path.parent for path in MODULES.values() if path.name != "__init__.py")
    assert {str(folder): count for folder, count in counts.items() if count > MOST_MODULES} == {}
