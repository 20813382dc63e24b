"""Charts of all monitors, and accuracy over labels, for one run or several."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from msn.evaluation.drawing import COLOURS, accuracy_lines
from msn.evaluation.sets import CLASSIFIERS, Row
from msn.reporting.record import RunRecord

_DASHES = ("solid", "dash", "dot", "dashdot")
FEW_POINTS = 20  # per line; so few are marked one by one
MOST_POINTS = 1500  # per line; more are averaged in bins, so that the page stays small

Figure = dict[str, Any]


class Chart(NamedTuple):
    """A plotly figure with title, help and a text for those who cannot see it."""

    title: str
    help: str
    figure: Figure
    alt: str


class Panel(NamedTuple):
    """Monitors that share a chart: metric names and their labels, and how to read them."""

    title: str
    series: dict[str, str]
    help: str
    format: str = ".4~g"


PANELS = (
    Panel(
        "Loss",
        {
            "train/loss": "loss",
            "train/cross_entropy": "cross-entropy",
            "train/cross_entropy_floor": "its floor",
        },
        "MSN: the cross-entropy cannot fall below its floor, the entropy of the targets. A flat "
        "loss near the floor is not a failure; both fall together while targets sharpen. Masked "
        "autoencoders: the error on masked patches.",
    ),
    Panel(
        "Reconstruction",
        {
            "reconstruction/error_of_means": "error of the means alone",
            "reconstruction/error_std": "spread over patches",
        },
        "Masked autoencoders: the error of predicting each masked patch's mean, below which the "
        "loss must fall, and how far patches differ.",
    ),
    Panel(
        "Prototypes in use",
        {"collapse/prototypes_used": "used", "collapse/prototype_perplexity": "perplexity"},
        "Prototypes that are the strongest of some image, and their effective number. Near 1: "
        "collapsed.",
    ),
    Panel(
        "Agreement of views",
        {"collapse/agreement_rand": "rand anchors", "collapse/agreement_focal": "focal anchors"},
        "Share of anchors whose strongest prototype is that of their target. It should rise. If it "
        "is near 100 % from the start, the views are too alike.",
        ".0%",
    ),
    Panel(
        "Confidence and spread",
        {
            "collapse/target_max_prob": "largest target probability",
            "collapse/mean_prediction_entropy": "entropy of the mean prediction / log K",
        },
        "Targets should be confident, while all prototypes together stay evenly used (entropy "
        "near 1).",
        ".2~f",
    ),
    Panel(
        "Probe: 10-NN on held-out images",
        {"probe/knn_top1": "10-NN top-1"},
        "Nearest-neighbour accuracy of the frozen features. No label is trained on.",
        ".1%",
    ),
    Panel(
        "Probe: alignment and uniformity",
        {"probe/alignment": "alignment", "probe/uniformity": "uniformity"},
        "Distance of two views of an image, and evenness of features on the sphere; smaller is "
        "better in both.",
    ),
    Panel(
        "Effective rank of features",
        {"features/rankme": "RankMe, training", "probe/rankme": "RankMe, probe"},
        "Directions that the features use. Near 1: collapsed.",
    ),
    Panel(
        "Spread of features",
        {"features/std": "standard deviation per dimension"},
        "Of unit-length features, times the root of their width: 1 where they cover all "
        "directions, 0 where all images look alike.",
    ),
    Panel(
        "me-max and entropy",
        {"train/me_max": "me-max", "train/entropy": "entropy of single predictions"},
        "me-max is the distance of the mean prediction from the prior, in nats; 0 is none.",
    ),
    Panel(
        "Gradient norm",
        {"train/grad_norm": "before clipping"},
        "MSN clips spikes of the encoder; of masked autoencoders it is that of all weights, and "
        "nothing is clipped.",
    ),
    Panel(
        "Learning rate",
        {"schedule/lr": "lr", "schedule/trunk_lr": "lr of the trunk's last layer"},
        "Warm-up, then a cosine.",
        ".3~g",
    ),
    Panel(
        "Other schedules",
        {
            "schedule/weight_decay": "weight decay",
            "schedule/momentum": "momentum of the target",
            "schedule/sharpen_temperature": "sharpening temperature",
        },
        "Weight decay, and of MSN the target's momentum and the sharpening.",
    ),
    Panel("Speed", {"speed/images_per_s": "images/s"}, "Over all processes.", ".4~s"),
    Panel(
        "Where the time goes",
        {"speed/data_wait": "waiting for data", "speed/mfu": "matrix rate used (MFU)"},
        "Waiting above a half: the run is bound by its data, not by the device. MFU is measured "
        "against this device's own rate in matrix products.",
        ".0%",
    ),
)


def curve_charts(records: Sequence[RunRecord]) -> list[Chart]:
    """A chart for each panel that has figures in any of the runs."""
    found = [_chart(panel, records) for panel in PANELS]
    return [chart for chart in found if chart is not None]


def _chart(panel: Panel, records: Sequence[RunRecord]) -> Chart | None:
    traces, told, several = [], [], len(records) > 1
    for r, record in enumerate(records):
        for s, (name, label) in enumerate(panel.series.items()):
            steps, values = record.series(name)
            if not values:
                continue
            x, y = thin(_epochs(record, steps), values)
            title = f"{record.name}: {label}" if several else label
            colour, dash = (r, s) if several else (s, 0)
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines" if len(x) > FEW_POINTS else "lines+markers",
                    "name": title,
                    "x": x,
                    "y": y,
                    "line": {
                        "color": COLOURS[colour % len(COLOURS)],
                        "dash": _DASHES[dash % len(_DASHES)],
                        "width": 2,
                    },
                    "marker": {"color": COLOURS[colour % len(COLOURS)]},
                }
            )
            told.append(f"{title} from {y[0]:.3g} to {y[-1]:.3g}")
    if not traces:
        return None
    in_epochs = all("steps_per_epoch" in record.facts for record in records)
    layout = {
        # The axis is named in the hover text, which leaves the room below for legends.
        "xaxis": {"unifiedhovertitle": {"text": f"{'epoch' if in_epochs else 'step'} %{{x}}"}},
        "yaxis": {"tickformat": panel.format, "hoverformat": panel.format},
        "showlegend": len(traces) > 1,
    }
    alt = f"Line chart over training: {'; '.join(told)}."
    return Chart(panel.title, panel.help, {"data": traces, "layout": layout}, alt)


def _epochs(record: RunRecord, steps: Sequence[float]) -> list[float]:
    """Steps as epochs, if run.json has the steps per epoch."""
    steps_per_epoch = record.facts.get("steps_per_epoch")
    if not steps_per_epoch:
        return list(steps)
    return [round(step / steps_per_epoch, 3) for step in steps]


def thin(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most `MOST_POINTS` points, means of equal bins with five digits."""
    size = math.ceil(len(x) / MOST_POINTS)
    bins = [slice(start, start + size) for start in range(0, len(x), size)]
    return [x[b][-1] for b in bins], [_short(sum(y[b]) / len(y[b])) for b in bins]


def _short(value: float) -> float:
    return float(f"{value:.5g}")


# Of charts whose x-axis has a title.
BELOW_TITLE = {"orientation": "h", "x": 0, "y": -0.25, "yanchor": "top"}


def table_of(record: RunRecord) -> tuple[list[str], list[tuple[str, list[Row | None]]]]:
    """Column titles and, per backbone and variant, one row per column, None where it has none."""
    rows: Sequence[Row] = [] if record.lowshot is None else record.lowshot["rows"]
    columns = list(dict.fromkeys(_column_title(row) for row in rows))
    backbones = list(dict.fromkeys(_row_title(row) for row in rows))
    cells = {(_row_title(row), _column_title(row)): row for row in rows}
    return columns, [
        (name, [cells.get((name, column)) for column in columns]) for name in backbones
    ]


def _row_title(row: Row) -> str:
    return f"{row['backbone']}, {row['variant']}" if row.get("variant") else row["backbone"]


def _column_title(row: Row) -> str:
    """Title of a column: classifier and labels."""
    labels = row["labels"]
    amount = f"{labels} labels"
    if labels.isdigit():
        amount = f"{labels} image{'' if labels == '1' else 's'} per class"
    name = f"{row.get('neighbours', 'k')}-NN" if row["classifier"] == "knn" else row["classifier"]
    return f"{CLASSIFIERS.get(name, name)}, {amount}"


def accuracy_chart(records: Sequence[RunRecord]) -> Chart | None:
    """Top-1 over labelled images, one line per backbone; None if no line has two points."""
    traces: list[dict[str, Any]] = []
    for record in records:
        prefix = f"{record.name}: " if len(records) > 1 else ""
        for line in accuracy_lines([] if record.lowshot is None else record.lowshot["rows"]):
            colour = line.colour if line.baseline else COLOURS[len(traces) % len(COLOURS)]
            traces.append(_trace(f"{prefix}{line.name}", line.points, colour))
    if not any(len(trace["x"]) > 1 for trace in traces):
        return None
    counts = sorted({x for trace in traces for x in trace["x"]})
    layout = {
        "xaxis": {
            "type": "log",
            "title": {"text": "labelled images"},
            "tickvals": counts,
            "ticktext": [f"{count:,}" for count in counts],
        },
        "yaxis": {"tickformat": ".0%", "hoverformat": ".1%", "title": {"text": "top-1"}},
        "showlegend": True,
        "legend": BELOW_TITLE,
    }
    told = "; ".join(
        f"{trace['name']} from {trace['y'][0]:.1%} to {trace['y'][-1]:.1%}" for trace in traces
    )
    return Chart(
        "Accuracy against labels",
        "Top-1 on held-out images; bars are the standard deviation over choices of the labelled "
        "images.",
        {"data": traces, "layout": layout},
        f"Line chart of accuracy over {counts[0]:,} to {counts[-1]:,} labelled images: {told}.",
    )


def _trace(name: str, points: Sequence[Row], colour: str) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": name,
        "x": [point["labelled_images"] for point in points],
        "y": [point["top1_mean"] for point in points],
        "error_y": {"type": "data", "array": [point["top1_std"] for point in points]},
        "line": {"color": colour},
    }
