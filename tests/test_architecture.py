"""The walls of the house: which room may import which, and how long files and functions are."""

import ast
from pathlib import Path

import pytest

import msn

PACKAGE = Path(msn.__file__).parent
# room -> rooms it may import; `BASE` and msn.golden lie below all.
ALLOWED = {
    "method": set(),
    "data": {"method"},
    "weights": {"method", "data"},
    "evaluation": {"method", "data", "weights"},
    "training": {"method", "data", "weights", "evaluation"},
    "reporting": {"method", "data", "weights", "evaluation"},
    "commands": {"method", "data", "weights", "evaluation", "training", "reporting"},
}
BASE = {"compilers", "errors", "files", "schema"}
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(path):
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else None


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    here = room(path)
    for name in imports(path):
        parts = name.split(".")
        if here is None or parts[0] != "msn" or len(parts) < 2:
            continue
        there = parts[1]
        assert there == here or there in BASE or there in ALLOWED.get(here, set()), name


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_hydra_and_lightning_stay_in_their_rooms(path):
    here, names = room(path), set(imports(path))
    if here not in ("commands", None):
        assert not {n for n in names if n.split(".")[0] in ("hydra", "omegaconf")}
    lightning = {n for n in names if n.split(".")[0] == "lightning"}
    if here in ("method", "weights", "reporting") or (here == "data" and path.stem != "datamodule"):
        assert not lightning
    if here == "evaluation":
        assert all(n.startswith("lightning.fabric") for n in lightning)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_functions_stay_short(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            docstring = ast.get_docstring(node, clean=False) or ""
            lines = node.end_lineno - node.lineno - docstring.count("\n")
            assert lines <= 55, f"{path.name}: {node.name}"
