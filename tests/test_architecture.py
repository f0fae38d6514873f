"""The import direction of CONTRIBUTING ("How it is built"), read from the source files themselves."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

LAYERS = [
    {"errors", "files", "metrics"},
    {"geo", "models", "config", "runtime"},
    {"sources"},
    {"chips", "inference", "evaluation"},
    {"training", "calibration"},
    {"cli"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
# Rules that the ranks alone do not say.
FORBIDDEN = {
    ("evaluation", "models"),
    ("training", "inference"),
    ("training", "evaluation"),
    ("models", "geo"),
}
PACKAGE = Path(__file__).resolve().parent.parent / "canopy"


def imported_parts(path: Path) -> set[str]:
    """The canopy parts that a module imports anywhere, function bodies included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    parts = {name.split(".")[1] for name in found if name.startswith("canopy.")}
    return {part for part in parts if part in RANK}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_downward(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own == "__init__":
        return  # the public API exports lazily from every layer
    for part in imported_parts(path) - {own}:
        assert (own, part) not in FORBIDDEN, f"{path.name} may not import canopy.{part}"
        assert RANK[part] <= RANK[own], f"canopy.{own} is below canopy.{part} and may not import it"
