"""Mistakes on held-out images: recall of each class, confusions, the worst images."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from msn.data.pools import PoolSettings, build_pools
from msn.errors import UserError
from msn.evaluation.predictions import PREDICTIONS, is_floor, read_predictions
from msn.evaluation.sets import Row
from msn.images.kinds import BadImageError
from msn.reporting.pictures import Gallery, as_picture, sized, strip
from msn.reporting.record import RunRecord
from msn.schema import make
from msn.weights.card import column_name

_WORST, _CLASSES, _SIDE = 8, 20, 64


def main_row(record: RunRecord) -> Row | None:
    """The row with the most labels and a recall per class, baselines aside; None in old tables."""
    rows = [] if record.lowshot is None else record.lowshot["rows"]
    own = [row for row in rows if row.get("recall") and not is_floor(row)]
    return max(own, key=lambda row: int(row["labelled_images"]), default=None)


def class_lines(row: Row) -> list[list[str]]:
    """Name, number of held-out images, recall and interval of each class, the worst first."""
    known = [(name, one) for name, one in row["recall"].items() if one["images"]]
    known = sorted(known, key=lambda item: item[1]["recall"])
    return [
        [name, f"{one['images']:,}", _percent(one["recall"], one["interval"])]
        for name, one in known
    ]


def class_caption(record: RunRecord, row: Row) -> str:
    """A caption for `class_lines`, with the means over the classes."""
    return (
        f"{record.name}: {row['backbone']}, {column_name(row)}: recall of each class with its 95 % "
        f"interval, %, the lowest first; balanced accuracy "
        f"{_percent(row['balanced_mean'], row['balanced_interval'])}, macro F1 "
        f"{_percent(row['macro_f1'], row['macro_f1_interval'])}"
    )


def _percent(value: float, interval: Sequence[float]) -> str:
    return f"{100 * value:.1f} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def confusion_picture(record: RunRecord) -> Gallery | None:
    """The evaluation's confusion matrix; None if there is none."""
    path = record.path / "confusion.png"
    if not path.is_file():
        return None
    with Image.open(path) as image:
        picture = as_picture(image.convert("RGB"), "", "Confusion matrix of the held-out images.")
    return Gallery(
        "What is taken for what",
        "Rows are classes with their held-out images, columns predictions; numbers are images, "
        "mean over label sets. All cells: confusion.csv.",
        [picture],
    )


def worst_images(record: RunRecord, row: Row) -> Gallery | None:
    """The images of each class that are classified wrongly with the most confidence.

    Args:
        record: of the run.
        row: whose predictions count.

    Raises:
        UserError: the images are no longer where they were.
    """
    key = {name: str(row.get(name, "")) for name in ("backbone", "classifier", "labels", "variant")}
    wrong: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for one in read_predictions(record.path / PREDICTIONS):
        same = all((one[name] or "") == value for name, value in key.items())
        if same and one["prediction"] not in ("", one["truth"]):
            wrong[one["truth"]].append(one)
    if not wrong:
        return None
    pool = build_pools(make("data", record.settings["data"], PoolSettings)).held_out
    if pool is None:
        raise UserError("there are no held-out images any more")
    place = {pool.name(i): i for i in range(len(pool))}
    pictures = []
    for name, _, recall in class_lines(row)[:_CLASSES]:
        worst = sorted(wrong.get(name, []), key=lambda one: -one["score"])[:_WORST]
        cells, shown = [], []
        for mistake in worst:
            title, i = Path(mistake["name"]).name, place.get(mistake["name"])
            try:
                if i is not None:
                    cells.append(sized(pool.source.rgb(int(pool.positions[i])), _SIDE))
                    shown.append(f"{title}: {mistake['prediction']} {mistake['score']:.2f}")
            except BadImageError:  # it is counted elsewhere
                continue
        if cells:
            caption = f"{name}, recall {recall} %: " + "; ".join(shown)
            pictures.append(as_picture(strip(cells), caption, f"Images of {caption}"))
    return Gallery(
        "Worst images of each class",
        f"Images that {column_name(row)} classifies wrongly with the most confidence, in the first "
        "label set; classes of the lowest recall first. All predictions: predictions.parquet or "
        ".csv.",
        pictures,
    )
