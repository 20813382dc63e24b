"""Predictions for the test images: accuracy, figures per class, intervals, and floors.

Legend: m test images, S label sets, C classes, R resamples of the test images.

With unbalanced classes, top-1 rewards a classifier that always predicts the largest one. *Balanced
accuracy* is the mean recall of the classes, *macro F1* their mean F1. All resamples are drawn from
one seed, so two classifiers are compared on the same ones.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

_RESAMPLES = 1000
_CONFIDENCE = 0.95
# Indices drawn at once while resampling.
_MAX_DRAWS = 2**24
# Number of classes up to which the scores of all classes are kept.
MOST_SCORES = 100
_UNEVEN = 2  # classes are unbalanced if the largest has more than this times the smallest
_NO_CLASS = -1


class Outcome(NamedTuple):
    """Predictions for the test images."""

    truth: Tensor
    """In [0, C), [m]."""
    predicted: Tensor
    """Of every label set, [S, m]; -1 for an unreadable image, which counts as wrong."""
    classes: Sequence[str]
    """Names, C of them."""
    score: Tensor | None = None
    """Probability (kNN: share of the votes) of the prediction of the first set, [m]."""
    scores: Tensor | None = None
    """Those of all classes, [m, C]; None for more than `MOST_SCORES` classes."""

    @property
    def correct(self) -> Tensor:
        """Whether each image is classified correctly, bool [S, m]."""
        return self.predicted == self.truth


def outcome_of(
    truth: Tensor,
    predicted: Tensor,
    classes: Sequence[str],
    *,
    unreadable: Tensor | None = None,
    scores: Tensor | None = None,
) -> Outcome:
    """Make an `Outcome`.

    Args:
        truth: [m].
        predicted: [S, m].
        classes: names.
        unreadable: test images that another image replaces, bool [m].
        scores: of the first set, [m, C].
    """
    score = None
    if scores is not None:
        score = scores.gather(1, predicted[:1].T)[:, 0].float()
        scores = scores.float() if len(classes) <= MOST_SCORES else None
    if unreadable is not None:
        predicted = predicted.masked_fill(unreadable, _NO_CLASS)
    return Outcome(truth, predicted, classes, score, scores)


class Figures(NamedTuple):
    """Accuracies of an outcome, or of R resamples of its test images."""

    top1: Tensor
    """[R]."""
    balanced: Tensor
    """Mean recall of the classes that have test images, [R]."""
    macro_f1: Tensor
    """Mean F1 of the classes that have test images or were predicted, [R]."""
    recall: Tensor
    """NaN where a class has no test image, [R, C]."""


def figures(outcome: Outcome, times: Tensor) -> Figures:
    """Accuracies over all label sets together, where each test image has a weight.

    Args:
        outcome: predictions.
        times: how often each image counts, float64 [R, m].
    """
    num_classes, (sets, count) = len(outcome.classes), outcome.predicted.shape
    image, right = torch.arange(count), outcome.correct.double().mean(dim=0)
    known = outcome.predicted != _NO_CLASS
    # Rows c: images of class c; C + c: those found; 2C + c: images predicted to be of class c.
    rows = [outcome.truth, outcome.truth + num_classes, outcome.predicted[known] + 2 * num_classes]
    columns = [image, image, image.expand(sets, -1)[known]]
    values = [torch.ones(count, dtype=torch.float64), right]
    values.append(torch.full((len(columns[2]),), 1 / sets, dtype=torch.float64))
    table = torch.sparse_coo_tensor(
        torch.stack([torch.cat(rows), torch.cat(columns)]),
        torch.cat(values),
        (3 * num_classes, count),
        check_invariants=False,  # else torch warns that it checks nothing
    )
    images, found, said = (table @ times.T).T.unflatten(1, (3, num_classes)).unbind(1)
    recall = found / images  # NaN without images
    return Figures(
        times @ right / times.sum(dim=1),
        recall.nanmean(dim=1),
        (2 * found / (images + said)).nanmean(dim=1),
        recall,
    )


def resampled(outcome: Outcome) -> Figures:
    """Accuracies in 1,000 seeded resamples of the test images.

    Only test images are resampled; the spread over label sets shows the effect of their choice.
    """
    count = len(outcome.truth)
    generator = torch.Generator().manual_seed(0)
    parts = []
    at_once = max(1, _MAX_DRAWS // count)
    for begin in range(0, _RESAMPLES, at_once):
        shape = (min(at_once, _RESAMPLES - begin), count)
        drawn = torch.randint(count, shape, generator=generator)
        once = torch.ones((), dtype=torch.float64).expand(shape)
        times = torch.zeros(shape, dtype=torch.float64).scatter_add_(1, drawn, once)
        parts.append(figures(outcome, times))
    return Figures(*(torch.cat(some) for some in zip(*parts, strict=True)))


def interval(values: Tensor) -> tuple[float, float]:
    """95 % interval of resampled values, [R], NaN left out."""
    tail = (1 - _CONFIDENCE) / 2
    low, high = values.nanquantile(torch.tensor([tail, 1 - tail], dtype=torch.float64))
    return float(low), float(high)


def measured(outcome: Outcome) -> dict[str, Any]:
    """Plain figures of an outcome for a row of the table, with 95 % bootstrap intervals."""
    top1 = outcome.correct.double().mean(dim=1)
    ones = torch.ones(1, len(outcome.truth), dtype=torch.float64)
    balanced = balanced_accuracies(outcome)
    whole, drawn = figures(outcome, ones), resampled(outcome)
    counts = torch.bincount(outcome.truth, minlength=len(outcome.classes)).tolist()
    return {
        "top1_mean": float(top1.mean()),
        "top1_std": spread(top1),
        "top1": top1.tolist(),
        "interval": list(interval(drawn.top1)),
        "balanced_mean": float(balanced.mean()),
        "balanced_std": spread(balanced),
        "balanced_interval": list(interval(drawn.balanced)),
        "macro_f1": float(whole.macro_f1),
        "macro_f1_interval": list(interval(drawn.macro_f1)),
        "recall": {
            name: {
                "images": images,
                "recall": float(whole.recall[0, i]) if images else None,
                "interval": list(interval(drawn.recall[:, i])) if images else None,
            }
            for i, (name, images) in enumerate(zip(outcome.classes, counts, strict=True))
        },
    }


def spread(values: Tensor) -> float:
    """Standard deviation over label sets; 0 for a single one."""
    return float(values.std()) if len(values) > 1 else 0.0


def balanced_accuracies(outcome: Outcome) -> Tensor:
    """Balanced accuracy of every label set, [S]."""
    ones = torch.ones(1, len(outcome.truth), dtype=torch.float64)
    alone = (outcome._replace(predicted=one.unsqueeze(0)) for one in outcome.predicted)
    return torch.cat([figures(one, ones).balanced for one in alone])


def is_unbalanced(row: Mapping[str, Any]) -> bool:
    """Whether the largest class has more than twice the test images of the smallest."""
    counts = [found["images"] for found in row.get("recall", {}).values() if found["images"]]
    return bool(counts) and max(counts) > _UNEVEN * min(counts)


def above(ours: Outcome, floor: Outcome, *, balanced: bool) -> dict[str, Any]:
    """How far a classifier is above another on the same test images.

    Args:
        ours: predictions.
        floor: those of a baseline.
        balanced: compares balanced accuracy, else top-1.

    Returns:
        `metric`, `difference`, and its 95 % bootstrap `interval`, as fractions.
    """
    metric = "balanced" if balanced else "top1"
    ones = torch.ones(1, len(ours.truth), dtype=torch.float64)
    one, other = (getattr(figures(found, ones), metric) for found in (ours, floor))
    drawn = getattr(resampled(ours), metric) - getattr(resampled(floor), metric)
    found = {"metric": metric, "difference": float(one - other)}
    return {**found, "interval": list(interval(drawn))}


def confusion(outcome: Outcome) -> Tensor:
    """Confusion matrix, mean over the label sets, [C, C + 1].

    The last column counts unreadable images.
    """
    num_classes, sets = len(outcome.classes), len(outcome.predicted)
    column = outcome.predicted.remainder(num_classes + 1)  # -1 is the last
    cells = outcome.truth * (num_classes + 1) + column
    counts = torch.bincount(cells.flatten(), minlength=num_classes * (num_classes + 1))
    return counts.view(num_classes, -1).double() / sets
