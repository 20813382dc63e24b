"""What a person and a program get from an evaluation: a table and lowshot.json."""

import json
import os
import platform
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

_PACKAGES = ("torch", "torchvision", "timm", "lightning")


def write_results(path: Path, rows: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> None:
    """Write lowshot.json whole or not at all.

    Args:
        path: the file.
        rows: see `msn.evaluation.lowshot.KShot.rows`.
        config: resolved settings that the rows come from.

    Raises:
        OSError: if it cannot be written.
    """
    versions = {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}
    content = {"rows": list(rows), "config": dict(config), "versions": versions}
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w") as file:
            json.dump(content, file, indent=1)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def print_table(rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """Print one line a backbone: mean and standard deviation over splits, in percent."""
    columns = list(dict.fromkeys((row["classifier"], row["labels"]) for row in rows))
    table = Table(title=title)
    table.add_column("backbone")
    for classifier, labels in columns:
        table.add_column(_heading(classifier, labels, rows), justify="right")
    for backbone in dict.fromkeys(row["backbone"] for row in rows):
        cells = {
            (row["classifier"], row["labels"]): _cell(row)
            for row in rows
            if row["backbone"] == backbone
        }
        table.add_row(backbone, *(cells.get(column, "") for column in columns))
    Console().print(table)


def _heading(classifier: str, labels: str, rows: Sequence[Mapping[str, Any]]) -> str:
    if classifier == "knn":
        k = next(row["neighbours"] for row in rows if row["classifier"] == "knn")
        return f"{k}-NN\n{labels} labels"
    per_class = f"{labels} a class" if labels.isdigit() else f"{labels} labels"
    return f"{classifier}\n{per_class}"


def _cell(row: Mapping[str, Any]) -> str:
    mean = f"{100 * row['top1_mean']:.1f}"
    return mean if row["splits"] == 1 else f"{mean} +- {100 * row['top1_std']:.1f}"
