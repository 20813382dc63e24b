"""Write and read predictions per test image, and the table of confusions."""

import csv
import io
from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from msn.evaluation.outcomes import confusion
from msn.evaluation.sets import Result, Row, formula_free
from msn.files import utf8, write_bytes, write_file
from msn.weights.weights import BASELINES

PREDICTIONS = "predictions"
_KEY = ("backbone", "classifier", "labels", "variant")


class Prediction(NamedTuple):
    """Prediction for a test image by the classifier of a row's first label set."""

    backbone: str
    classifier: str
    labels: str
    variant: str
    set: str
    """Name of the label set."""
    name: str
    """Of the image."""
    truth: str
    prediction: str
    """Empty for an image that cannot be read."""
    score: float
    """Probability of the prediction; kNN: share of the votes."""
    scores: Sequence[float] | None
    """Of all classes, in their order; None for very many classes."""


def main_result(results: Sequence[Result]) -> Result | None:
    """The first row with the most labels that is not a baseline's; pictures show it."""
    own = [result for result in results if result.outcome is not None and not is_floor(result.row)]
    return max(own, key=lambda result: int(result.row["labelled_images"]), default=None)


def is_floor(row: Row) -> bool:
    """Whether a row is of a baseline."""
    return row["backbone"] in BASELINES


def predictions(results: Sequence[Result], names: Sequence[str]) -> Iterator[Prediction]:
    """Predictions of all rows except those of baselines, image by image."""
    for row, _, outcome in results:
        if outcome is None or outcome.score is None or is_floor(row):
            continue
        backbone, classifier, labels, variant = (str(row.get(name, "")) for name in _KEY)
        names_of = [*outcome.classes, ""]  # -1 is the last
        score = outcome.score.tolist()
        scores = None if outcome.scores is None else outcome.scores.tolist()
        pairs = zip(outcome.truth.tolist(), outcome.predicted[0].tolist(), strict=True)
        for i, (truth, said) in enumerate(pairs):
            yield Prediction(
                backbone=backbone,
                classifier=classifier,
                labels=labels,
                variant=variant,
                set=row["split_names"][0],
                name=names[i],
                truth=names_of[truth],
                prediction=names_of[said],
                score=score[i],
                scores=None if scores is None else scores[i],
            )


def write_predictions(place: Path, results: Sequence[Result], names: Sequence[str]) -> None:
    """Write `place`.parquet, or .csv if pyarrow is missing, all or nothing.

    Args:
        place: path without suffix.
        results: with outcomes; all have the same classes.
        names: of the test images.

    Raises:
        UserError: it cannot be written.
    """
    found = list(predictions(results, names))
    classes = next((list(r.outcome.classes) for r in results if r.outcome is not None), [])
    if not found:
        return
    if find_spec("pyarrow") is not None:
        table = _arrow_table(found, classes)
        write = import_module("pyarrow.parquet").write_table
        write_file(place.with_suffix(".parquet"), lambda file: write(table, file))
        return
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    shown = classes if found[0].scores is not None else []
    writer.writerow([*Prediction._fields[:-1], *(f"score {name}" for name in shown)])
    for one in found:
        cells = [formula_free(cell) for cell in one[:-2]]
        numbers = [one.score, *(one.scores or [])]
        writer.writerow([*cells, *(f"{number:.6g}" for number in numbers)])
    write_bytes(place.with_suffix(".csv"), text.getvalue().encode("utf-8", "surrogateescape"))


def _arrow_table(found: Sequence[Prediction], classes: Sequence[str]) -> Any:
    pyarrow = import_module("pyarrow")
    columns: dict[str, Any] = {
        field: pyarrow.array([utf8(getattr(one, field)) for one in found])
        for field in Prediction._fields[:-2]
    }
    columns["score"] = pyarrow.array([one.score for one in found], pyarrow.float32())
    columns["scores"] = pyarrow.array(
        [one.scores for one in found], pyarrow.list_(pyarrow.float32())
    )
    about = {"classes": "\n".join(map(utf8, classes))}  # the order of `scores`
    return pyarrow.table(columns).replace_schema_metadata(about)


def read_predictions(place: Path) -> list[dict[str, Any]]:
    """Rows of `place`.parquet or `place`.csv, without `scores`; none if there is no file."""
    if place.with_suffix(".parquet").is_file() and find_spec("pyarrow") is not None:
        read = import_module("pyarrow.parquet").read_table
        found: list[dict[str, Any]] = read(
            place.with_suffix(".parquet"), columns=list(Prediction._fields[:-1])
        ).to_pylist()
        return found
    if not place.with_suffix(".csv").is_file():
        return []
    with place.with_suffix(".csv").open(newline="", errors="surrogateescape") as file:
        return [{**row, "score": float(row["score"])} for row in csv.DictReader(file)]


def confusion_table(results: Sequence[Result]) -> str:
    """The non-zero cells of the confusion matrices as CSV, one per line."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*_KEY, "truth", "prediction", "images"])
    for row, _, outcome in results:
        if outcome is None or is_floor(row):
            continue
        counts, names = confusion(outcome), [*outcome.classes, ""]
        for i, j in counts.nonzero().tolist():
            cells = [*(row.get(name, "") for name in _KEY), names[i], names[j]]
            writer.writerow([*map(formula_free, cells), f"{float(counts[i, j]):g}"])
    return text.getvalue()
