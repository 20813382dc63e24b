"""Choosing lambda inside a labelled set: stratified folds, scored by held-out accuracy."""

from typing import NamedTuple

import torch
from torch import Tensor

from msn.data.sampler import permutation

_FOLDS = 5  # keeps these draws apart from others of the same seed


class Fold(NamedTuple):
    """One fold of one label set."""

    of: int
    """Which label set."""
    train: Tensor
    """Positions within the set, [n - v]."""
    held_out: Tensor
    """Positions within the set, [v]."""


def folds_of(labels: Tensor, num_folds: int, *, of: int) -> list[Fold]:
    """Cut a label set into stratified folds.

    Args:
        labels: classes of the set's images, [n].
        num_folds: >= 2; fewer are made where no class has as many images.
        of: number of the set, kept with the folds.

    Returns:
        The folds, none where no class has two images. Each image is held out once, each class as
        evenly as its count allows; which images go together depends on the set alone.
    """
    members = [torch.nonzero(labels == label)[:, 0] for label in labels.unique()]
    num_folds = min(num_folds, max(len(positions) for positions in members))
    if num_folds < 2:
        return []
    fold = torch.empty(len(labels), dtype=torch.long)
    dealt = 0  # dealing goes on where the last class ended, so that folds are of one size
    for label, positions in enumerate(members):
        order = torch.from_numpy(permutation(len(positions), 0, _FOLDS, label))
        fold[positions[order]] = (torch.arange(len(positions)) + dealt) % num_folds
        dealt += len(positions)
    return [
        Fold(of, torch.nonzero(fold != i)[:, 0], torch.nonzero(fold == i)[:, 0])
        for i in range(num_folds)
    ]


def best_lambds(accuracy: Tensor, log_loss: Tensor, grid: list[float]) -> list[float]:
    """The best value of an ascending grid for each label set.

    Args:
        accuracy: held-out accuracy over all folds, [S, L].
        log_loss: held-out log loss over all folds, [S, L]; breaks ties of the accuracy.
        grid: L values, ascending; between equals the larger, more regularised one wins.
    """
    best = []
    for right, loss in zip(accuracy.tolist(), log_loss.tolist(), strict=True):
        order = max(range(len(grid)), key=lambda i: (right[i], -loss[i], grid[i]))
        best.append(grid[order])
    return best
