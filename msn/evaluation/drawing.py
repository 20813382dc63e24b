"""Pictures of an evaluation (accuracy over labels, confusion matrix), and a notebook's table."""

import itertools
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any, BinaryIO, NamedTuple

import matplotlib
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator
from rich.table import Table

from msn.evaluation.outcomes import Outcome, confusion
from msn.evaluation.sets import CLASSIFIERS, Row, printable

# Distinct for colour-blind readers too, on light and on dark ground (after Okabe and Ito).
COLOURS = ("#2f8fd0", "#e0712a", "#12a67c", "#cf7bb0", "#dba117", "#7d8be0", "#8c8c8c")
_BASELINES = {"random": "#9a9a9a", "pixels": "#b9a98c", "majority": "#c8c8c8"}
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # tell lines apart in print


class Line(NamedTuple):
    """A line of accuracy over labelled images."""

    name: str
    """Backbone, and the classifier if it is not logistic regression."""
    colour: str
    baseline: bool
    points: list[Row]
    """Rows, sorted by their number of labelled images."""


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
        False if no backbone has two points; nothing is written then.
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
                label=line.name.replace("$", r"\$"),  # matplotlib reads formulas between two $
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


_MOST_NUMBERS = 20  # classes up to which each cell is written
_MOST_NAMES = 60  # and up to which each class is named


def draw_confusion(outcome: Outcome, title: str, file: BinaryIO) -> None:
    """Draw the confusion matrix, as shares of each class, as PNG.

    Args:
        outcome: predictions; the mean over label sets is drawn.
        title: above the picture.
        file: where to write.
    """
    counts = confusion(outcome)[:, :-1]
    totals = torch.bincount(outcome.truth, minlength=len(counts)).double()
    shares = counts / totals.clamp_min(1)[:, None]
    names = [printable(name).replace("$", r"\$") for name in outcome.classes]
    side = min(12.0, 3.5 + 0.35 * len(names))
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    picture = axes.imshow(shares.numpy(), vmin=0, vmax=1, cmap="Blues")
    if len(names) <= _MOST_NAMES:
        axes.set_xticks(range(len(names)), names, rotation=90)
        rows = [f"{name} ({int(total)})" for name, total in zip(names, totals, strict=True)]
        axes.set_yticks(range(len(names)), rows)
    for i, j in itertools.product(*map(range, counts.shape)):
        if len(names) <= _MOST_NUMBERS and counts[i, j]:
            ink = "white" if shares[i, j] > 1 / 2 else "black"
            axes.text(j, i, f"{counts[i, j]:.3g}", ha="center", va="center", color=ink, fontsize=8)
    axes.set_xlabel("predicted")
    axes.set_ylabel("class (held-out images)")
    axes.set_title(printable(title).replace("$", r"\$"), fontsize=10)
    figure.colorbar(picture, label="share of the class", shrink=0.7)
    figure.savefig(file, format="png", dpi=130, metadata={"Software": None})


def html_table(table: Table) -> str:
    """The table for a notebook."""

    def line(tag: str, cells: Iterable[Any]) -> str:
        texts = [escape(str(cell)).replace("\n", "<br>") for cell in cells]
        return "<tr>" + "".join(f"<{tag}>{text}</{tag}>" for text in texts) + "</tr>"

    head = line("th", [column.header for column in table.columns])
    lines = zip(*(column.cells for column in table.columns), strict=True)
    body = "".join(line("td", cells) for cells in lines)
    note = escape(str(table.caption or ""))
    return f"<table><thead>{head}</thead><tbody>{body}</tbody></table><p>{note}</p>"
