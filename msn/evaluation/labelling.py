"""From some labels to the classes of all other images: the classifier that a person will use.

lambda is chosen by cross-validation inside the labelled images, which also says how good the
classifier is: every labelled image is predicted once by a classifier that has not seen it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from msn.evaluation.frozen import Fold, Logistic, best_lambds, folds_of
from msn.evaluation.outcomes import Outcome, outcome_of
from msn.evaluation.sets import FeatureSet


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
        fallback: `lambd` where neither is possible, because no class has two images.
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
