"""The low-shot table and accuracy against labels, for one run or several."""

from collections.abc import Mapping, Sequence
from typing import Any

from msn.reporting.curves import COLOURS, Chart
from msn.reporting.record import RunRecord

_NAMES = {"logistic": "logistic", "linear": "linear probe", "finetune": "fine-tuned"}
# Of charts whose x-axis has a title.
BELOW_TITLE = {"orientation": "h", "x": 0, "y": -0.25, "yanchor": "top"}
_BASELINES = {"random": "#9a9a9a", "pixels": "#b9a98c"}

Row = Mapping[str, Any]


def table_of(record: RunRecord) -> tuple[list[str], list[tuple[str, list[Row | None]]]]:
    """Column titles and, for each backbone and variant, its rows; None where it has none."""
    rows: Sequence[Row] = [] if record.lowshot is None else record.lowshot["rows"]
    columns = list(dict.fromkeys(column_title(row) for row in rows))
    backbones = list(dict.fromkeys(_row_title(row) for row in rows))
    cells = {(_row_title(row), column_title(row)): row for row in rows}
    return columns, [
        (name, [cells.get((name, column)) for column in columns]) for name in backbones
    ]


def _row_title(row: Row) -> str:
    return f"{row['backbone']}, {row['variant']}" if row.get("variant") else row["backbone"]


def column_title(row: Row) -> str:
    """What a column of the table is called: labels a class and classifier."""
    labels = row["labels"]
    amount = {"all": "all labels"}.get(labels, labels if "%" in labels else f"{labels} a class")
    if row["classifier"] == "knn":
        return f"{row.get('neighbours', 'k')}-NN, {amount}"
    return f"{_NAMES.get(row['classifier'], row['classifier'])}, {amount}"


def accuracy_chart(records: Sequence[RunRecord]) -> Chart | None:
    """Top-1 over labelled images, a line a backbone; None where no line has two points."""
    traces: list[dict[str, Any]] = []
    for record in records:
        lines: dict[tuple[str, str], list[Row]] = {}
        for row in [] if record.lowshot is None else record.lowshot["rows"]:
            if row["classifier"] in ("logistic", "finetune") and not row.get("variant"):
                lines.setdefault((row["backbone"], row["classifier"]), []).append(row)
        for (backbone, classifier), points in lines.items():
            prefix = f"{record.name}: " if len(records) > 1 else ""
            suffix = "" if classifier == "logistic" else f" ({_NAMES[classifier]})"
            colour = _BASELINES.get(backbone) or COLOURS[len(traces) % len(COLOURS)]
            points = sorted(points, key=lambda row: row["labelled_images"])
            traces.append(_trace(f"{prefix}{backbone}{suffix}", points, colour))
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
