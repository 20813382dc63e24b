"""The low-shot table on screen and in files, and the fitted heads.

As in the paper, it has one line per backbone and one column per number of labels.
"""

import csv
import io
import json
import platform
import re
from collections.abc import Mapping, Sequence
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from msn.evaluation.drawing import draw_confusion, draw_curve
from msn.evaluation.features import LabelledSet
from msn.evaluation.outcomes import is_unbalanced
from msn.evaluation.predictions import PREDICTIONS, confusion_table, main_result, write_predictions
from msn.evaluation.sets import CLASSIFIERS, Head, Result, Row, formula_free, printable, table_key
from msn.files import write_bytes
from msn.progress import in_notebook
from msn.weights.card import column_name, floors_note
from msn.weights.tensors import save_tensors

_CSV = (
    *("backbone", "classifier", "labels", "variant", "splits", "labelled_images", "test_images"),
    *("replaced_images", "unreadable_test_images"),
    *("top1_mean", "top1_std", "interval_low", "interval_high"),
    *("balanced_mean", "balanced_std", "balanced_low", "balanced_high"),
    *("macro_f1", "macro_f1_low", "macro_f1_high"),
    *("lambda", "lambd", "lambda_choice"),
    *("cross_validated_top1_mean", "cross_validated_top1_std"),
    *("paper_model", "paper_top1", "paper_std"),
)


def table_of(rows: Sequence[Row], title: str) -> Table:
    """The table for a terminal, with a note on how to read it."""
    table = Table(title=title, title_justify="left", caption=note(rows), caption_justify="left")
    table.add_column("backbone", no_wrap=True)
    for heading in _columns(rows).values():
        table.add_column("\n".join(heading), justify="right", no_wrap=True)
    for name, cells, last in _lines(rows):
        table.add_row(Text(name), *("\n".join(cell) for cell in cells), end_section=last)
    return table


def list_of(rows: Sequence[Row], title: str) -> str:
    """The table as a list with one line per figure, for a narrow terminal."""
    columns, lines = list(_columns(rows).values()), [title]
    for name, cells, _ in _lines(rows):
        lines += ["", name]
        for heading, cell in zip(columns, cells, strict=True):
            if any(cell):
                lines += [" ".join(heading), *(f"  {line}" for line in cell)]
    return "\n".join([*lines, "", note(rows)])


def markdown_table(rows: Sequence[Row]) -> str:
    """The table in Markdown."""
    names = ["backbone", *(" ".join(heading) for heading in _columns(rows).values())]
    lines = ["| " + " | ".join(names) + " |", "|---|" + "---:|" * (len(names) - 1)]
    for name, cells, _ in _lines(rows):
        lines.append(
            "| " + " | ".join([in_markdown(name), *(" ".join(cell) for cell in cells)]) + " |"
        )
    below = [line for words in floors_note(rows) for line in ("", in_markdown(words))]
    return "\n".join([*lines, "", note(rows), *below, ""])


def in_markdown(name: str) -> str:
    """A name, escaped so that it makes no new column, tag or link in a cell."""
    return re.sub(r"([\\`*\[\]|])", r"\\\1", escape(name, quote=False))


def csv_table(rows: Sequence[Row]) -> str:
    """One line per row of lowshot.json with every plain number, accuracies as fractions.

    Text that a spreadsheet would take for a formula begins with an apostrophe.
    """
    text = io.StringIO()
    names = ("data", *_CSV) if any("data" in row for row in rows) else _CSV
    writer = csv.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        paper, other = row.get("paper") or {}, row.get("cross_validated") or {}
        flat = {
            **row,
            **_ends("interval", row["interval"]),
            **_ends("balanced", row.get("balanced_interval")),
            **_ends("macro_f1", row.get("macro_f1_interval")),
            **{f"paper_{key}": paper.get(key) for key in ("model", "top1", "std")},
            **{f"cross_validated_{key}": other.get(key) for key in ("top1_mean", "top1_std")},
        }
        writer.writerow({key: formula_free(value) for key, value in flat.items()})
    return text.getvalue()


def _ends(name: str, interval: Sequence[float] | None) -> dict[str, Any]:
    low, high = interval or (None, None)
    return {f"{name}_low": low, f"{name}_high": high}


def note(rows: Sequence[Row]) -> str:
    """The note below the table: what the figures are."""
    parts = ["Top-1 on held-out images in %; [ ] 95 % bootstrap interval over these"]
    splits = sorted({row["splits"] for row in rows if row["splits"] > 1})
    if splits:
        numbers = " or ".join(map(str, splits))
        parts.append(f"+- standard deviation over {numbers} sets of labelled images")
    if any(map(is_unbalanced, rows)):
        parts.append("balanced: mean recall of the classes, as some have few held-out images")
    parts += _strengths(rows)
    parts += _features(rows)
    if replaced := max((row.get("replaced_images", 0) for row in rows), default=0):
        parts.append(
            f"{_images(replaced, 'labelled')} cannot be read; others of the class replace them"
        )
    if unreadable := max((row.get("unreadable_test_images", 0) for row in rows), default=0):
        verb = "counts" if unreadable == 1 else "count"
        parts.append(f"{_images(unreadable, 'held-out')} cannot be read and {verb} as wrong")
    for row in rows:
        if short := row.get("short_classes"):
            names = ", ".join(f"{printable(n)} {c}" for n, c in list(short["images"].items())[:5])
            taken = {"take_all": "all are used", "leave_out": "none is used; they count as wrong"}
            parts.append(f"{row['labels']} per class: {names} images, {taken[short['rule']]}")
    if any(row["classifier"] == "spreading" for row in rows):
        parts.append("spreading: label spreading over all training images, labelled or not")
    if any("cross_validated" in row for row in rows):
        parts.append("cv: lambda cross-validated inside each labelled set, never on test images")
    if any(not row.get("converged", True) for row in rows):
        parts.append("NOT CONVERGED: raise protocol.logistic.max_evaluations")
    return "; ".join(parts) + "."


def _images(count: int, kind: str) -> str:
    return f"{count} {kind} image{'' if count == 1 else 's'}"


def _features(rows: Sequence[Row]) -> list[str]:
    """Which feature each backbone has, if they differ."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row.get("feature") not in (None, "pixels"):
            found.setdefault(row["feature"], []).append(printable(row["backbone"]))
    return [
        f"feature {feature} ({', '.join(dict.fromkeys(names))})"
        for feature, names in found.items()
        if len(found) > 1
    ]


def _strengths(rows: Sequence[Row]) -> list[str]:
    """The regularisation of each column."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row.get("lambda_choice") == "fixed":
            found.setdefault(f"{row['lambd']:g}", []).append(row["labels"])
        elif row.get("lambda_choice") == "cross-validation":
            found.setdefault("cross-validated", []).append(row["labels"])
    return [
        f"lambda * n = {value} ({', '.join(dict.fromkeys(labels))})"
        if len(found) > 1
        else f"lambda * n = {value}"
        for value, labels in found.items()
    ]


Column = tuple[tuple[str, str, str], str]
"""A column: the `table_key` of its rows, and the figure, `top1` or `balanced`."""


def headings(rows: Sequence[Row]) -> dict[Column, tuple[str, str]]:
    """The two lines of every column's heading, in the order of the rows."""
    figures = ("top1", "balanced") if any(map(is_unbalanced, rows)) else ("top1",)
    found: dict[Column, tuple[str, str]] = {}
    for row in rows:
        labels = row["labels"]
        second = f"{labels} per class" if labels.isdigit() else f"{labels} labels"
        first = f"{row['neighbours']}-NN" if row["classifier"] == "knn" else ""
        first = first or " ".join([CLASSIFIERS[row["classifier"]], row.get("variant", "")]).strip()
        for figure in figures:
            title = f"{first}, balanced" if figure == "balanced" else first
            found[table_key(row), figure] = (title, second)
    return found


def _columns(rows: Sequence[Row]) -> dict[Column, tuple[str, str]]:
    """The headings without label spreading, which has a line below logistic regression."""
    found = headings(rows)
    return {
        (key, figure): heading
        for (key, figure), heading in found.items()
        if key[0] != "spreading" or (("logistic", *key[1:]), figure) not in found
    }


def _lines(rows: Sequence[Row]) -> list[tuple[str, list[list[str]], bool]]:
    """Name, cells (as lines) and whether this is the last line of a backbone."""
    columns = list(_columns(rows))
    lines = []
    shown: set[str] = set()  # the paper's figures are below the first backbone of their kind
    for backbone in dict.fromkeys(row["backbone"] for row in rows):
        own = {table_key(row): row for row in rows if row["backbone"] == backbone}
        name = printable(backbone)
        several = [(name, [_measured(own.get(key), figure) for key, figure in columns])]
        if any("cross_validated" in row for row in own.values()):
            chosen = [_spread(own.get(key), figure, "cross_validated") for key, figure in columns]
            several.append((f"{name}, cv", chosen))
        spreading = {("logistic", *key[1:]): r for key, r in own.items() if key[0] == "spreading"}
        if any((key, "top1") in columns for key in spreading):
            found = [_measured(spreading.get(key), figure) for key, figure in columns]
            several.append((f"{name}, spreading", found))
        models = {row["paper"]["model"] for row in own.values() if row.get("paper")}
        for model in sorted(models - shown):
            published = [_published(own.get(key), figure) for key, figure in columns]
            several.append((f"paper, {model}", published))
        shown |= models
        ends = [False] * (len(several) - 1) + [True]
        lines += [(*line, end) for line, end in zip(several, ends, strict=True)]
    return lines


def _measured(row: Row | None, figure: str) -> list[str]:
    found = (
        None if row is None else row.get("interval" if figure == "top1" else f"{figure}_interval")
    )
    if found is None:
        return [""]
    return [*_spread(row, figure), f"[{100 * found[0]:.1f}, {100 * found[1]:.1f}]"]


def _spread(row: Row | None, figure: str, inside: str | None = None) -> list[str]:
    values: Mapping[str, Any] | None = row if row is None or inside is None else row.get(inside)
    if row is None or values is None or f"{figure}_mean" not in values:
        return [""]
    mean = f"{100 * values[f'{figure}_mean']:.1f}"
    return [mean if row["splits"] == 1 else f"{mean} +- {100 * values[f'{figure}_std']:.1f}"]


def _published(row: Row | None, figure: str) -> list[str]:
    paper = None if row is None or figure != "top1" else row.get("paper")
    if not paper:
        return [""]
    spread = "" if paper["std"] is None else f" +- {100 * paper['std']:.1f}"
    return [f"{100 * paper['top1']:.1f}{spread}"]


_ANY_WIDTH = 100_000
_FILE_WIDTH = 200  # characters of a line if the output is not a terminal
_DISTRIBUTION = "msn-pretraining"
_ABOUT_HEAD = ("backbone", "weights", "image_size", "classifier", "labels", "lambda", "crop")
_VERSIONS = ("torch", "torchvision", "timm", "numpy")


def print_table(results: Sequence[Result], title: str) -> None:
    """Print the table to standard output; no figure is cut, even in a narrow terminal.

    A notebook shows the one that `msn.pretrain` or `msn.evaluate` returns.
    """
    rows, console = [result.row for result in results], Console()
    table = table_of(rows, title)
    needed = Console(width=_ANY_WIDTH).measure(table).maximum
    if in_notebook():
        pass
    elif not console.is_terminal:
        # In a file, lines are not cut at 80 columns.
        Console(width=max(_FILE_WIDTH, needed)).print(table)
    elif console.width < needed:
        console.print(list_of(rows, title), markup=False, highlight=False)
    else:
        console.print(table)
    for line in floors_note(rows):
        print(printable(line))


def write_results(
    path: Path,
    results: Sequence[Result],
    config: Mapping[str, Any],
    test: LabelledSet | None = None,
) -> None:
    """Write lowshot.json, beside it .csv, .md, .png and .svg, predictions, and heads in `heads/`.

    Each file is complete or missing. The JSON is written last, so it shows that all are there.

    Args:
        path: the JSON file, in the run directory.
        results: rows with their heads and predictions.
        config: plain data, kept in the JSON file.
        test: the test images, whose predictions are written; None writes none.

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
    if test is not None and (main := main_result(results)) is not None:
        write_predictions(path.parent / PREDICTIONS, results, test.names)
        write_bytes(
            path.parent / "confusion.csv", confusion_table(results).encode(errors="replace")
        )
        picture = io.BytesIO()
        assert main.outcome is not None
        title = f"{main.row['backbone']}, {column_name(main.row)}"
        draw_confusion(main.outcome, title, picture)
        write_bytes(path.parent / "confusion.png", picture.getvalue())
    content = {"rows": rows, "config": dict(config), "versions": versions()}
    text = json.dumps(content, indent=1, allow_nan=False, default=str) + "\n"
    write_bytes(path, text.encode())


def save_head(path: Path, head: Head, row: Mapping[str, Any]) -> None:
    """Write a head that `msn.weights` can fold into an exported classifier.

    The safetensors file holds `weight` [C, D] and, with an intercept, `bias` [C]. Its metadata
    `msn` describes the features that the head takes.
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
    """Versions of Python and the libraries that affect the figures."""
    found = {"python": platform.python_version(), **{name: version(name) for name in _VERSIONS}}
    try:
        found["msn"] = version(_DISTRIBUTION)
    except PackageNotFoundError:  # run from a checkout that is not installed
        found["msn"] = "not installed"
    return found
