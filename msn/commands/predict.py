"""`python -m msn predict checkpoint=RUN data.root=DIR labels=FILE out=FILE`: classify the rest.

lambda is chosen by cross-validation inside the labelled images, which also says how good the
classifier is: every labelled image is predicted once by a classifier that has not seen it.
"""

import csv
import io
import logging
import os
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from msn.commands.entry import to_plain
from msn.commands.eval_lowshot import cache_directory, choose_device, without_views
from msn.commands.suggest_labels import images_of
from msn.data.datamodule import resolve_workers
from msn.data.dataset import Subset
from msn.data.layout import UNLABELLED
from msn.data.lists import Columns, index_list
from msn.data.pools import PoolSettings, whole_source
from msn.data.sources import FileSource, Source, find_depth
from msn.data.subsets import places_of
from msn.data.workers import in_one_line, less_memory
from msn.errors import UserError
from msn.evaluation.backbones import FrozenBackbone, open_backbones
from msn.evaluation.features import FeatureSettings, Runtime, weights_key
from msn.evaluation.frozen import Fold, Logistic, best_lambds, folds_of
from msn.evaluation.outcomes import Outcome, measured, outcome_of
from msn.evaluation.sets import FeatureSet, Head, UnlabelledImages, formula_free
from msn.evaluation.table import save_head
from msn.files import write_bytes
from msn.images.depth import check_depth, trained_depth
from msn.schema import as_argument, make


class Fitted(NamedTuple):
    """A classifier on features, and what cross-validation says of it."""

    weight: Tensor
    """Of prepared rows, [C, D] (one column more with an intercept)."""
    lambd: float
    """lambda * n."""
    folds: int
    """Of the cross-validation; 0 where the labels are too few for one."""
    outcome: Outcome | None
    """Of the labelled images, each predicted without itself; None without folds."""

    def probabilities(self, rows: Tensor) -> Tensor:
        """Of every class, [n, D] prepared rows -> [n, C]."""
        return (rows @ self.weight.T).softmax(dim=1)


def fit_labelled(labelled: FeatureSet, settings: Logistic, *, fallback: float) -> Fitted:
    """Fit a classifier on all labelled images.

    Args:
        labelled: their features, labels and groups.
        settings: of the regression. Without a fixed `lambd` the grid is searched.
        fallback: `lambd` if the grid cannot be searched (`folds_of` gives no folds).
    """
    rows, labels, classes = settings.prepare(labelled.features), labelled.labels, labelled.classes
    folds = folds_of(labels, settings.folds, of=0, groups=labelled.groups)
    grid = [settings.lambd] if settings.lambd is not None else sorted(settings.lambd_grid or [])
    lambd, outcome = fallback if settings.lambd is None else settings.lambd, None
    if folds and grid:
        scores = _held_out_scores(rows, labels, folds, grid, settings, len(classes))
        right = (scores.argmax(dim=2) == labels).double().sum(dim=1)
        losses = -scores.log().gather(2, labels.expand(len(grid), -1).unsqueeze(2)).sum(dim=(1, 2))
        (lambd,) = best_lambds(right[None], losses.double()[None], grid)
        chosen = scores[grid.index(lambd)]
        outcome = outcome_of(labels, chosen.argmax(dim=1).unsqueeze(0), classes, scores=chosen)
    weight = _fit(rows, labels, [lambd], settings, len(classes))[0]
    return Fitted(weight, lambd, len(folds), outcome)


def _held_out_scores(
    rows: Tensor,
    labels: Tensor,
    folds: Sequence[Fold],
    grid: Sequence[float],
    settings: Logistic,
    num_classes: int,
) -> Tensor:
    """Probabilities of every image from the fold that leaves it out, [len(grid), n, C]."""
    scores = torch.empty(len(grid), len(rows), num_classes)
    for fold in folds:
        weights = _fit(rows[fold.train], labels[fold.train], grid, settings, num_classes)
        found = (rows[fold.held_out] @ weights.mT).softmax(dim=-1)
        scores[:, fold.held_out] = found.clamp_min(torch.finfo(torch.float32).tiny)
    return scores


def _fit(
    rows: Tensor, labels: Tensor, lambds: Sequence[float], settings: Logistic, num_classes: int
) -> Tensor:
    fit = settings.fit(
        rows.unsqueeze(0),
        labels.unsqueeze(0),
        num_classes=num_classes,
        lambds=lambds,
        tolerance=settings.tolerance,
    )
    return fit.weight[0]


log = logging.getLogger(__name__)

_FALLBACK = 0.0025  # lambda * n where labels are too few to choose it, as in protocol=kshot
_MOST_COLUMNS = 100  # classes up to which each has a column
_SHOWN = 5


class Labels(NamedTuple):
    """What is known of the images of a source."""

    numbers: np.ndarray
    """Class numbers, int64 [n], -1 where none is known."""
    classes: list[str]


def run(config: DictConfig) -> list[dict[str, Any]]:
    """Fit on what is labelled, predict the rest, say how good that is.

    Returns:
        What was written: path, prediction, probability and that of every class.

    Raises:
        UserError: if a setting, a path or a file is wrong, or there are not two classes.
    """
    settings = to_plain(without_views(config))
    out = None if settings["out"] is None else Path(str(settings["out"])).resolve()
    if out is not None:
        _check_out("out", out, ".csv", settings["overwrite"])
    head = None if settings["head"] is None else Path(str(settings["head"])).resolve()
    if head is not None:
        _check_out("head", head, ".safetensors", settings["overwrite"])
    logistic = make("logistic", settings["logistic"], Logistic)
    features = make("features", settings["features"], FeatureSettings)
    (subject,) = open_backbones(
        settings["checkpoint"],
        image_size=features.image_size,
        num_heads=settings["model"]["num_heads"],
        key=settings["init_key"],
        family=settings["init_family"],
    )
    subject.check(features)
    source = _source(settings, subject)
    labels = _labels(settings, source)
    found = _features(source, subject, features, settings)
    labelled = np.flatnonzero((labels.numbers != UNLABELLED) & found.readable)
    train = FeatureSet(
        found.rows[labelled],
        torch.from_numpy(labels.numbers[labelled]),
        labels.classes,
        groups=None if source.groups is None else torch.from_numpy(source.groups[labelled]),
    )
    if len(train.labels.unique()) < 2:
        raise UserError("labels: two classes are needed with an image that can be read")
    fitted = fit_labelled(train, logistic, fallback=_FALLBACK)
    rest = np.flatnonzero((labels.numbers == UNLABELLED) & found.readable)
    rows = _rows(source, rest, fitted.probabilities(logistic.prepare(found.rows[rest])), labels)
    if out is not None:
        write_bytes(out, _table(rows, labels.classes).encode("utf-8", "surrogateescape"))
    if head is not None:
        _save_head(head, fitted, labels.classes, subject, features, logistic, len(train.labels))
    _say_quality(fitted, train, [source.name(int(i)) for i in labelled])
    _say_rest(rows, source, found.readable, out)
    return rows


def _check_out(key: str, path: Path, suffix: str, overwrite: bool) -> None:
    if path.suffix != suffix:
        raise UserError(f"{key}={path}: the name must end in {suffix}")
    if path.is_dir():
        raise UserError(f"{key}={path} is a directory; it must be a file")
    if path.exists() and overwrite is not True:
        raise UserError(f"{key}={path} exists; overwrite=true replaces it")


def _source(settings: dict[str, Any], subject: FrozenBackbone) -> Source:
    """All images, be they labelled or not."""
    data = images_of(settings["data"])
    if settings["labels"] is not None:
        data |= {"label_column": None, "use_labels": False}  # those of the list count
    source = whole_source(make("data", data, PoolSettings))
    depth = trained_depth(check_depth(data["depth"]), [subject.about])
    source.depth = find_depth(source, depth)
    return source


def _labels(settings: dict[str, Any], source: Source) -> Labels:
    """Those of a list, by path or name; without one those of the data.

    Raises:
        UserError: there are none, or a listed image is not among the data.
    """
    if settings["labels"] is None:
        if source.labels is None:
            raise UserError(f"labels=FILE is needed: {source.where} has no labels: {source.why}")
        return Labels(source.labels, source.classes)
    file = str(settings["labels"])
    base = os.path.dirname(os.path.abspath(file))
    columns = Columns(label=settings["data"]["label_column"])
    listed = index_list(file, key="labels", base=base, use_labels=True, columns=columns)
    if listed.labels is None:
        raise UserError(f"labels={file}: {listed.why}")
    known = np.flatnonzero(listed.labels != UNLABELLED)
    names = [source.name(i) for i in range(len(source))]
    # Of paths that lead to the files, be they absolute or relative to the list, the own names.
    own = {}
    if isinstance(source, FileSource):
        own = {_plain(source.path(i)): name for i, name in enumerate(names)}
    paths = [listed.paths[i] for i in known.tolist()]
    wanted = [own.get(_plain(os.path.join(base, path)), path) for path in paths]
    numbers = np.full(len(source), UNLABELLED)
    places = places_of(wanted, names, classes=[], where=f"labels={file}")
    numbers[places] = listed.labels[known]
    return Labels(numbers, listed.classes)


def _plain(path: str) -> str:
    """The same text for all ways to write the folder of a file."""
    folder, name = os.path.split(os.path.abspath(path))
    return os.path.join(_real(folder), name)


_real = lru_cache(maxsize=4096)(os.path.realpath)


class _Found(NamedTuple):
    rows: Tensor  # [n, D]
    readable: np.ndarray  # bool [n]


def _features(
    source: Source, subject: FrozenBackbone, features: FeatureSettings, settings: dict[str, Any]
) -> _Found:
    runtime = Runtime(
        (choose_device(settings["device"]),),
        resolve_workers(settings["data"]["num_workers"], in_memory=False),
        cache_directory(settings["cache_dir"]),
    )
    with in_one_line(lambda: less_memory("features.batch_size", features.batch_size)):
        found = subject.features(UnlabelledImages(Subset(source)), features, runtime, "features")
    return _Found(found.rows, ~found.replaced.numpy())


def _rows(
    source: Source, rest: np.ndarray, probabilities: Tensor, labels: Labels
) -> list[dict[str, Any]]:
    best = probabilities.max(dim=1)
    several = len(labels.classes) <= _MOST_COLUMNS
    return [
        {
            "path": source.name(int(i)),
            "prediction": labels.classes[int(best.indices[at])],
            "probability": float(best.values[at]),
            "probabilities": probabilities[at].tolist() if several else None,
        }
        for at, i in enumerate(rest)
    ]


def _table(rows: Sequence[dict[str, Any]], classes: Sequence[str]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = [f"p {name}" for name in classes] if len(classes) <= _MOST_COLUMNS else []
    writer.writerow(["path", "prediction", "probability", *map(formula_free, columns)])
    for row in rows:
        numbers = [row["probability"], *(row["probabilities"] or [])]
        writer.writerow([row["path"], row["prediction"], *(f"{p:.6g}" for p in numbers)])
    return text.getvalue()


def _save_head(
    path: Path,
    fitted: Fitted,
    classes: Sequence[str],
    subject: FrozenBackbone,
    features: FeatureSettings,
    logistic: Logistic,
    count: int,
) -> None:
    weight, bias = fitted.weight, None
    if logistic.intercept:
        weight, bias = weight[:, :-1], weight[:, -1]
    row = {
        "backbone": subject.name,
        "weights": weights_key(subject.trunk),
        "image_size": subject.image_size,
        "classifier": "logistic",
        "labels": f"{count} images",
        "lambda": fitted.lambd / count,
        "crop": features.crop,
    }
    head = Head(weight, bias, classes, subject.kind(features), True, True, "predict")
    save_head(path, head, row)


def _say_quality(fitted: Fitted, train: FeatureSet, names: Sequence[str]) -> None:
    """Print what cross-validation inside the labelled images says, and labels to look at."""
    counts = torch.bincount(train.labels, minlength=len(train.classes))
    told = ", ".join(f"{name} {int(n)}" for name, n in zip(train.classes, counts, strict=True))
    print(f"fitted on {len(names)} labelled images ({told}), lambda * n = {fitted.lambd:g}")
    if fitted.outcome is None:
        print(
            "how good it is cannot be said: cross-validation needs a class with two labelled images"
            + (", and more than one group" if train.groups is not None else "")
        )
        return
    found, largest = measured(fitted.outcome), float(counts.max()) / len(names)
    low, high = found["interval"]
    parts = [f"{100 * found['top1_mean']:.1f} % right [{100 * low:.1f}, {100 * high:.1f}]"]
    low, high = found["balanced_interval"]
    parts.append(f"balanced {100 * found['balanced_mean']:.1f} [{100 * low:.1f}, {100 * high:.1f}]")
    parts.append(f"the largest class alone {100 * largest:.1f}")
    print(f"cross-validated inside them, {fitted.folds} folds: {', '.join(parts)}")
    recalls = sorted(
        (one["recall"], name) for name, one in found["recall"].items() if one["images"]
    )
    print("recall: " + ", ".join(f"{name} {100 * recall:.0f} %" for recall, name in recalls[:20]))
    # One class for all images has the recall 1 in that class and 0 in all others.
    if found["interval"][0] <= largest and found["balanced_interval"][0] <= 1 / len(recalls):
        print("no better than the largest class alone: label more images, or take another backbone")
        return
    assert fitted.outcome.score is not None
    wrong = torch.nonzero(~fitted.outcome.correct[0])[:, 0]
    worst = wrong[fitted.outcome.score[wrong].argsort(descending=True)][:_SHOWN].tolist()
    for i in worst:
        said = train.classes[int(fitted.outcome.predicted[0, i])]
        print(
            f"  look again: {names[i]} is labelled {train.classes[int(train.labels[i])]}, "
            f"predicted {said} ({float(fitted.outcome.score[i]):.2f})"
        )


def _say_rest(
    rows: Sequence[dict[str, Any]], source: Source, readable: np.ndarray, out: Path | None
) -> None:
    """Print how the rest was classified, and what could not be read."""
    bad = [source.name(int(i)) for i in np.flatnonzero(~readable)]
    if bad:
        print(f"left out, cannot be read: {len(bad)} images (first: {', '.join(bad[:_SHOWN])})")
    counts = Counter(row["prediction"] for row in rows)
    told = ", ".join(f"{name} {n}" for name, n in counts.most_common(20)) or "nothing"
    place = "" if out is None else f": {as_argument('out', out)}"
    print(f"{len(rows)} images predicted ({told}){place}")
