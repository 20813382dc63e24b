"""The low-shot table as text, like the paper's: a line a backbone, a column a number of labels."""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from rich.table import Table
from rich.text import Text

from msn.evaluation.sets import Row, printable

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
_UNITS = {"logistic": "logistic", "linear": "linear", "finetune": "fine-tuned"}


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
    """The same for a terminal that is too narrow for the table: a line a figure."""
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
    """A name that stays one cell and text: no column, tag or link of its own."""
    return re.sub(r"([\\`*\[\]|])", r"\\\1", escape(name, quote=False))


def csv_table(rows: Sequence[Row]) -> str:
    """One line a row of lowshot.json with every plain number, accuracies as fractions.

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
    if replaced := max((row.get("replaced_images", 0) for row in rows), default=0):
        parts.append(f"{replaced} labelled images cannot be read: others of their class stand in")
    if unreadable := max((row.get("unreadable_test_images", 0) for row in rows), default=0):
        parts.append(f"{unreadable} held-out images cannot be read and count as wrong")
    if any("cross_validated" in row for row in rows):
        parts.append("cv: lambda cross-validated inside each labelled set, never on test images")
    if any(not row.get("converged", True) for row in rows):
        parts.append("NOT CONVERGED: raise protocol.logistic.max_evaluations")
    return "; ".join(parts) + "."


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


def _key(row: Row) -> tuple[str, str, str]:
    return row["classifier"], row["labels"], row.get("variant", "")


def _headings(rows: Sequence[Row]) -> dict[tuple[str, str, str], tuple[str, str]]:
    """Two lines for every column, in the order of the rows."""
    headings = {}
    for row in rows:
        labels = row["labels"]
        second = f"{labels} a class" if labels.isdigit() else f"{labels} labels"
        first = f"{row['neighbours']}-NN" if row["classifier"] == "knn" else ""
        first = first or " ".join([_UNITS[row["classifier"]], row.get("variant", "")]).strip()
        headings[_key(row)] = (first, second)
    return headings


def _lines(rows: Sequence[Row]) -> list[tuple[str, list[list[str]], bool]]:
    """Name, cells (as lines) and whether a backbone ends here."""
    columns = list(_headings(rows))
    lines = []
    shown: set[str] = set()  # the paper's figures stand below the first backbone of their kind
    for backbone in dict.fromkeys(row["backbone"] for row in rows):
        own = {_key(row): row for row in rows if row["backbone"] == backbone}
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
