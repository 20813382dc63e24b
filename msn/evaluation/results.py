"""What an evaluation leaves in the run directory: tables, a curve, fitted heads."""

import io
import json
import platform
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console

from msn.evaluation.curves import draw_curve
from msn.evaluation.sets import Head, Result
from msn.evaluation.table import csv_table, list_of, markdown_table, table_of
from msn.files import write_bytes
from msn.weights.tensors import save_tensors

_ANY_WIDTH = 100_000
_FILE_WIDTH = 200  # characters of a line where the output is no terminal
_DISTRIBUTION = "msn-pretraining"
_ABOUT_HEAD = ("backbone", "weights", "image_size", "classifier", "labels", "lambda")
_VERSIONS = ("torch", "torchvision", "timm", "numpy")


def print_table(results: Sequence[Result], title: str) -> None:
    """Print the table to standard output; no figure is cut, however narrow a terminal is."""
    rows, console = [result.row for result in results], Console()
    table = table_of(rows, title)
    needed = Console(width=_ANY_WIDTH).measure(table).maximum
    if not console.is_terminal:
        # A table cut at 80 columns because the output goes to a file helps nobody.
        Console(width=max(_FILE_WIDTH, needed)).print(table)
    elif console.width < needed:
        console.print(list_of(rows, title), markup=False, highlight=False)
    else:
        console.print(table)


def write_results(path: Path, results: Sequence[Result], config: Mapping[str, Any]) -> None:
    """Write lowshot.json, beside it .csv, .md, .png and .svg, and heads in `heads/`.

    Each file is whole or not there; the JSON comes last, as the sign that all are.

    Args:
        path: the JSON file, in the run directory.
        results: rows with their heads.
        config: plain data, kept in the JSON file.

    Raises:
        UserError: if the directory cannot be written.
    """
    rows = []
    for result in results:
        head = None if result.head is None else f"heads/{head_name(result)}"
        rows.append({**result.row, "head": head})
        if result.head is not None and head is not None:
            save_head(path.parent / head, result.head, result.row)
    write_bytes(path.with_suffix(".csv"), csv_table(rows).encode(errors="replace"))
    write_bytes(path.with_suffix(".md"), markdown_table(rows).encode(errors="replace"))
    for suffix in ("png", "svg"):
        picture = io.BytesIO()
        if draw_curve(rows, picture, suffix):
            write_bytes(path.with_suffix(f".{suffix}"), picture.getvalue())
    content = {"rows": rows, "config": dict(config), "versions": versions()}
    text = json.dumps(content, indent=1, allow_nan=False, default=str) + "\n"
    write_bytes(path, text.encode())


def save_head(path: Path, head: Head, row: Mapping[str, Any]) -> None:
    """Write a head that `msn.weights` can fold into an exported classifier.

    The safetensors file holds `weight` [C, D] and, with an intercept, `bias` [C]; its metadata
    `msn` says what features the head wants.
    """
    tensors = (
        {"weight": head.weight} if head.bias is None else {"weight": head.weight, "bias": head.bias}
    )
    about = {
        "format": 1,
        "classes": list(head.classes),
        "feature": head.feature,
        "centred": head.centred,
        "normalised": head.normalised,
        "split": head.split,
        **{key: row[key] for key in _ABOUT_HEAD if key in row},
    }
    save_tensors(path, tensors, {"msn": json.dumps(about)})


def head_name(result: Result) -> str:
    """File name of a head: backbone, classifier and labels."""
    row = result.row
    parts = [row["backbone"], row["classifier"], row["labels"].replace("%", "pc")]
    parts += [row["variant"]] if "variant" in row else []
    return "_".join(re.sub(r"[^\w.-]+", "-", str(part)) for part in parts) + ".safetensors"


def versions() -> dict[str, str]:
    """Versions of what makes the numbers."""
    found = {"python": platform.python_version(), **{name: version(name) for name in _VERSIONS}}
    try:
        found["msn"] = version(_DISTRIBUTION)
    except PackageNotFoundError:  # run from a checkout that is not installed
        found["msn"] = "not installed"
    return found
