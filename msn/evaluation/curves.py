"""Accuracy against the number of labels, one line a backbone, as a picture."""

from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from msn.evaluation.sets import printable

# Told apart by colour-blind readers as well (Okabe and Ito), and by their markers in print.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_BASELINES = {"random": "#777777", "pixels": "#AAAAAA"}


def draw_curve(rows: Sequence[Mapping[str, Any]], file: BinaryIO, suffix: str) -> bool:
    """Draw top-1 over labelled images for the few-label rows; equal rows give equal bytes.

    Args:
        rows: of `lowshot.json`; those with `logistic` or `finetune` are drawn.
        file: where to write.
        suffix: `png` or `svg`.

    Returns:
        False where no backbone has two points, and nothing was written.
    """
    lines = _lines(rows)
    if not any(len(points) > 1 for points in lines.values()):
        return False
    # Without this SVG ids are random.
    with matplotlib.rc_context({"svg.hashsalt": "msn", "font.size": 11}):
        figure = Figure(figsize=(6.4, 4.4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        trained = 0
        for (backbone, classifier), points in lines.items():
            baseline = _BASELINES.get(backbone)
            axes.errorbar(
                [point["labelled_images"] for point in points],
                [100 * point["top1_mean"] for point in points],
                yerr=[100 * point["top1_std"] for point in points],
                label=_label(backbone, classifier),
                color=baseline or _COLOURS[trained % len(_COLOURS)],
                marker=_MARKERS[trained % len(_MARKERS)] if baseline is None else ".",
                linestyle="-" if baseline is None else "--",
                capsize=3,
            )
            trained += baseline is None
        _label_axes(axes, [point for points in lines.values() for point in points])
        metadata = {"Date": None} if suffix == "svg" else {"Software": None}
        figure.savefig(file, format=suffix, dpi=150, metadata=metadata)
    return True


def _lines(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    lines: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["classifier"] in ("logistic", "finetune"):
            lines.setdefault((row["backbone"], row["classifier"]), []).append(row)
    for points in lines.values():
        points.sort(key=lambda point: point["labelled_images"])
    return lines


def _label(backbone: str, classifier: str) -> str:
    name = printable(backbone).replace("$", r"\$")  # between two of them matplotlib reads formulas
    return name if classifier == "logistic" else f"{name} ({classifier})"


def _label_axes(axes: Any, points: Sequence[Mapping[str, Any]]) -> None:
    names = {point["labelled_images"]: point["labels"] for point in points}
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(sorted(names)))
    axes.xaxis.set_minor_locator(NullLocator())
    counts = sorted(names)
    axes.set_xticklabels(
        [names[n] if names[n].endswith("%") else f"{names[n]}\n({n})" for n in counts]
    )
    axes.set_xlabel("labelled images per class (in all)")
    axes.set_ylabel("top-1 accuracy on held-out images, %")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
