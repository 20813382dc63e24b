"""The walls of the house: which room may import which, and how long files and functions are."""

import ast
from pathlib import Path

import msn

PACKAGE = Path(msn.__file__).parent
# room -> rooms it may import; `BASE` and msn.golden lie below all.
ALLOWED = {
    "method": set(),
    "images": set(),
    "data": {"method", "images"},
    "weights": {"method", "images"},
    "evaluation": {"method", "images", "data", "weights"},
    "training": {"method", "images", "data", "weights", "evaluation"},
    "reporting": {"method", "images", "data", "weights", "evaluation"},
    "commands": {"method", "images", "data", "weights", "evaluation", "training", "reporting"},
}
BASE = {"compilers", "errors", "files", "progress", "schema"}
TREES = {path: ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


def room(path):
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else None


def imports():
    """File, its room, and a name that it imports."""
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            yield from ((path, room(path), str(name)) for name in names)


def functions():
    for tree in TREES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield node


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def test_there_is_something_to_look_at():
    assert {room(path) for path in TREES} == {*ALLOWED, "golden", None}
    assert len(list(imports())) > 1000
    assert len(list(functions())) > 500


def test_no_import_is_relative():
    found = [
        path
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert not found


def test_imports_point_down():
    found = []
    for path, here, name in imports():
        there = name.split(".")[1] if name.startswith("msn.") else None
        if here is None or there is None:
            continue
        if there != here and there not in BASE | ALLOWED.get(here, set()):
            found.append((path, name))
    assert not found


def test_hydra_stays_with_the_commands():
    found = [
        (path, name)
        for path, here, name in imports()
        if name.split(".")[0] in ("hydra", "omegaconf") and here not in ("commands", None)
    ]
    assert not found


def test_lightning_stays_in_its_rooms():
    found = []
    for path, here, name in imports():
        if name.split(".")[0] != "lightning":
            continue
        plain = here in ("method", "images", "weights", "reporting")
        plain |= here == "data" and path.stem != "datamodule"
        if plain or (here == "evaluation" and not name.startswith("lightning.fabric")):
            found.append((path, name))
    assert not found


def test_no_private_name_is_taken_across_modules():
    found = [
        (path, name)
        for path, _, name in imports()
        if name.startswith("msn.") and any(map(is_private, name.split(".")))
    ]
    for path, tree in TREES.items():  # module._name
        ours = {
            alias.asname or alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
            if "msn" in (getattr(node, "module", None) or alias.name).split(".")
        }
        found += [
            (path, ast.unparse(node))
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and is_private(node.attr)
            if ast.unparse(node.value) in ours
        ]
    assert not found


def test_functions_stay_short():
    found = []
    for node in functions():
        lines = node.end_lineno - node.lineno
        docstring = ast.get_docstring(node, clean=False) or ""
        if lines - docstring.count("\n") > 55:
            found.append((node.name, "without its docstring"))
        if lines >= 60:
            found.append((node.name, f"{lines + 1} lines"))
    assert not found
