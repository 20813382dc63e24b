"""What an evaluation leaves: the low-shot table as text and files, its curve, the fitted heads.

Like the paper's table: one line per backbone, one column per number of labels.
"""

import csv
import io
import itertools
import json
import platform
import re
from collections.abc import Mapping, Sequence
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator
from rich.console import Console
from rich.table import Table
from rich.text import Text

from msn.evaluation.sets import Head, Result, Row, printable, table_key
from msn.files import write_bytes
from msn.weights.tensors import save_tensors

_CSV = (
    "backbone",
    "classifier",
    "labels",
    "variant",
    "splits",
    "labelled_images",
    "test_images",
    "replaced_images",
    "unreadable_test_images",
    "top1_mean",
    "top1_std",
    "interval_low",
    "interval_high",
    "lambda",
    "lambd",
    "lambda_choice",
    "cross_validated_top1_mean",
    "cross_validated_top1_std",
    "paper_model",
    "paper_top1",
    "paper_std",
)
CLASSIFIERS = {"logistic": "logistic", "linear": "linear", "finetune": "fine-tuned"}


def table_of(rows: Sequence[Row], title: str) -> Table:
    """The table for a terminal, with a note that says how to read it."""
    table = Table(title=title, title_justify="left", caption=note(rows), caption_justify="left")
    table.add_column("backbone", no_wrap=True)
    for heading in _headings(rows).values():
        table.add_column("\n".join(heading), justify="right", no_wrap=True)
    for name, cells, last in _lines(rows):
        table.add_row(Text(name), *("\n".join(cell) for cell in cells), end_section=last)
    return table


def list_of(rows: Sequence[Row], title: str) -> str:
    """The same for a terminal that is too narrow for the table: one line per figure."""
    headings, lines = list(_headings(rows).values()), [title]
    for name, cells, _ in _lines(rows):
        lines += ["", name]
        for heading, cell in zip(headings, cells, strict=True):
            if any(cell):
                lines += [" ".join(heading), *(f"  {line}" for line in cell)]
    return "\n".join([*lines, "", note(rows)])


def markdown_table(rows: Sequence[Row]) -> str:
    """The same table in markdown."""
    names = ["backbone", *(" ".join(heading) for heading in _headings(rows).values())]
    lines = ["| " + " | ".join(names) + " |", "|---|" + "---:|" * (len(names) - 1)]
    for name, cells, _ in _lines(rows):
        lines.append(
            "| " + " | ".join([_in_markdown(name), *(" ".join(cell) for cell in cells)]) + " |"
        )
    return "\n".join([*lines, "", note(rows), ""])


def _in_markdown(name: str) -> str:
    """A name as plain text of one cell: it makes no new column, tag or link."""
    return re.sub(r"([\\`*\[\]|])", r"\\\1", escape(name, quote=False))


def csv_table(rows: Sequence[Row]) -> str:
    """One line per row of lowshot.json with every plain number, accuracies as fractions.

    Text that a spreadsheet would take for a formula begins with an apostrophe.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, _CSV, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        paper, other = row.get("paper") or {}, row.get("cross_validated") or {}
        low, high = row["interval"]
        flat = {
            **row,
            "interval_low": low,
            "interval_high": high,
            **{f"paper_{key}": paper.get(key) for key in ("model", "top1", "std")},
            **{f"cross_validated_{key}": other.get(key) for key in ("top1_mean", "top1_std")},
        }
        writer.writerow({key: _no_formula(value) for key, value in flat.items()})
    return text.getvalue()


def _no_formula(value: Any) -> Any:
    starts = isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r"))
    return f"'{value}" if starts else value


def note(rows: Sequence[Row]) -> str:
    """What the figures are, in words."""
    parts = ["Top-1 on held-out images in %; [ ] 95 % bootstrap interval over these"]
    splits = sorted({row["splits"] for row in rows if row["splits"] > 1})
    if splits:
        numbers = " or ".join(map(str, splits))
        parts.append(f"+- standard deviation over {numbers} sets of labelled images")
    parts += _strengths(rows)
    parts += _features(rows)
    if replaced := max((row.get("replaced_images", 0) for row in rows), default=0):
        parts.append(
            f"{_images(replaced, 'labelled')} cannot be read: others of the class stand in"
        )
    if unreadable := max((row.get("unreadable_test_images", 0) for row in rows), default=0):
        verb = "counts" if unreadable == 1 else "count"
        parts.append(f"{_images(unreadable, 'held-out')} cannot be read and {verb} as wrong")
    if any("cross_validated" in row for row in rows):
        parts.append("cv: lambda cross-validated inside each labelled set, never on test images")
    if any(not row.get("converged", True) for row in rows):
        parts.append("NOT CONVERGED: raise protocol.logistic.max_evaluations")
    return "; ".join(parts) + "."


def _images(count: int, kind: str) -> str:
    return f"{count} {kind} image{'' if count == 1 else 's'}"


def _features(rows: Sequence[Row]) -> list[str]:
    """Which feature each backbone gave, where they differ."""
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
    """The regularisation of each column, where it is one."""
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


def _headings(rows: Sequence[Row]) -> dict[tuple[str, str, str], tuple[str, str]]:
    """Two lines for every column, in the order of the rows."""
    headings = {}
    for row in rows:
        labels = row["labels"]
        second = f"{labels} per class" if labels.isdigit() else f"{labels} labels"
        first = f"{row['neighbours']}-NN" if row["classifier"] == "knn" else ""
        first = first or " ".join([CLASSIFIERS[row["classifier"]], row.get("variant", "")]).strip()
        headings[table_key(row)] = (first, second)
    return headings


def _lines(rows: Sequence[Row]) -> list[tuple[str, list[list[str]], bool]]:
    """Name, cells (as lines) and whether a backbone ends here."""
    columns = list(_headings(rows))
    lines = []
    shown: set[str] = set()  # the paper's figures stand below the first backbone of their kind
    for backbone in dict.fromkeys(row["backbone"] for row in rows):
        own = {table_key(row): row for row in rows if row["backbone"] == backbone}
        name = printable(backbone)
        several = [(name, [_measured(own.get(column)) for column in columns])]
        if any("cross_validated" in row for row in own.values()):
            chosen = [_spread(own.get(column), "cross_validated") for column in columns]
            several.append((f"{name}, cv", chosen))
        models = {row["paper"]["model"] for row in own.values() if row.get("paper")}
        for model in sorted(models - shown):
            several.append((f"paper, {model}", [_published(own.get(column)) for column in columns]))
        shown |= models
        ends = [False] * (len(several) - 1) + [True]
        lines += [(*line, end) for line, end in zip(several, ends, strict=True)]
    return lines


def _measured(row: Row | None) -> list[str]:
    if row is None:
        return [""]
    low, high = row["interval"]
    return [*_spread(row), f"[{100 * low:.1f}, {100 * high:.1f}]"]


def _spread(row: Row | None, inside: str | None = None) -> list[str]:
    values: Mapping[str, Any] | None = row if row is None or inside is None else row.get(inside)
    if row is None or values is None:
        return [""]
    mean = f"{100 * values['top1_mean']:.1f}"
    return [mean if row["splits"] == 1 else f"{mean} +- {100 * values['top1_std']:.1f}"]


def _published(row: Row | None) -> list[str]:
    paper = None if row is None else row.get("paper")
    if not paper:
        return [""]
    spread = "" if paper["std"] is None else f" +- {100 * paper['std']:.1f}"
    return [f"{100 * paper['top1']:.1f}{spread}"]


# Told apart by colour-blind readers as well, on light and on dark ground (after Okabe and Ito).
COLOURS = ("#2f8fd0", "#e0712a", "#12a67c", "#cf7bb0", "#dba117", "#7d8be0", "#8c8c8c")
_BASELINES = {"random": "#9a9a9a", "pixels": "#b9a98c"}
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # tell lines apart in print


class Line(NamedTuple):
    """A line of accuracy over labelled images."""

    name: str
    """Backbone, and the classifier where it is not logistic regression."""
    colour: str
    baseline: bool
    points: list[Row]
    """By their number of labelled images."""


def accuracy_lines(rows: Sequence[Row]) -> list[Line]:
    """The few-label rows of each backbone and classifier."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["labelled_images"]):
        if row["classifier"] in ("logistic", "finetune"):
            found.setdefault((row["backbone"], row["classifier"]), []).append(row)
    lines: list[Line] = []
    for (backbone, classifier), points in found.items():
        name = printable(backbone)
        name += "" if classifier == "logistic" else f" ({CLASSIFIERS[classifier]})"
        trained = sum(not line.baseline for line in lines)
        colour = _BASELINES.get(backbone, COLOURS[trained % len(COLOURS)])
        lines.append(Line(name, colour, backbone in _BASELINES, points))
    return lines


def draw_curve(rows: Sequence[Row], file: BinaryIO, suffix: str) -> bool:
    """Draw top-1 over labelled images for the few-label rows; equal rows give equal bytes.

    Args:
        rows: of `lowshot.json`; those with `logistic` or `finetune` are drawn.
        file: where to write.
        suffix: `png` or `svg`.

    Returns:
        False where no backbone has two points, and nothing was written.
    """
    lines = accuracy_lines(rows)
    if not any(len(line.points) > 1 for line in lines):
        return False
    # Without this SVG ids are random.
    with matplotlib.rc_context({"svg.hashsalt": "msn", "font.size": 11}):
        figure = Figure(figsize=(6.4, 4.4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        markers = itertools.cycle(_MARKERS)
        for line in lines:
            axes.errorbar(
                [point["labelled_images"] for point in line.points],
                [100 * point["top1_mean"] for point in line.points],
                yerr=[100 * point["top1_std"] for point in line.points],
                label=line.name.replace("$", r"\$"),  # matplotlib reads formulas between two
                color=line.colour,
                marker="." if line.baseline else next(markers),
                linestyle="--" if line.baseline else "-",
                capsize=3,
            )
        _label_axes(axes, [point for line in lines for point in line.points])
        metadata = {"Date": None} if suffix == "svg" else {"Software": None}
        figure.savefig(file, format=suffix, dpi=150, metadata=metadata)
    return True


def _label_axes(axes: Any, points: Sequence[Row]) -> None:
    names = {point["labelled_images"]: point["labels"] for point in points}
    counts = sorted(names)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(counts))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels(
        [names[n] if names[n].endswith("%") else f"{names[n]}\n({n})" for n in counts]
    )
    axes.set_xlabel("labelled images per class (in all)")
    axes.set_ylabel("top-1 accuracy on held-out images, %")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


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
        # A table cut at 80 columns because the output goes to a file is of no use.
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
