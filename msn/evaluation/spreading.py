"""Label spreading: few labels travel along a graph of nearest neighbours of all training images.

It is scikit-learn's (Zhou et al. 2004), on features or raw pixels. The graph is built once for all
label sets. Images without a label take part; test images do not: each gets the mean of what its
nearest training images have.
"""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from scipy.sparse import csr_matrix
from sklearn.semi_supervised import LabelSpreading
from torch import Tensor

from msn.evaluation.logistic import centre_and_normalise
from msn.evaluation.neighbours import nearest
from msn.evaluation.sets import LabelSet, Result, Trial, make_row
from msn.schema import Range, check_ranges

_MOST_ROUNDS = 1000  # far more than a small alpha needs
_UNLABELLED = -1  # as scikit-learn has it


@dataclass(frozen=True, kw_only=True)
class Spreading:
    """Settings of label spreading; the values live in `configs/protocol/kshot.yaml`.

    Raises:
        UserError: a number is out of range.
    """

    neighbours: Annotated[int, Range(2)]  # of each image in the graph, itself among them
    # How much of a neighbour's label an image takes over.
    alpha: Annotated[float, Range(0, 1, above_low=True, below_high=True)]
    most_images: Annotated[int, Range(1)]  # training images above which it is left out

    def __post_init__(self) -> None:
        check_ranges("protocol.spreading", self)


def spreading_results(trial: Trial, settings: Spreading) -> list[Result]:
    """A result for each number of labels, over all its label sets.

    Args:
        trial: whose training features are of all images, labelled or not.
        settings: of the graph.
    """
    rows = centre_and_normalise(trial.train.features.to(trial.device))
    test_rows = centre_and_normalise(trial.test.features.to(trial.device))
    k = min(settings.neighbours, len(rows))
    graph, to_test = _neighbours(rows, rows, k), _neighbours(rows, test_rows, k)
    results = []
    for name in dict.fromkeys(labelled.labels for labelled in trial.sets):
        group = [labelled for labelled in trial.sets if labelled.labels == name]
        scores = [_spread(graph, to_test, trial, labelled, settings.alpha) for labelled in group]
        predicted = torch.stack([one.argmax(dim=1) for one in scores])
        outcome = trial.test.outcome(predicted, scores[0])
        row = make_row(
            backbone=trial.backbone,
            classifier="spreading",
            labels=name,
            outcome=outcome,
            splits=[labelled.split for labelled in group],
            labelled_images=len(group[0].positions),
            neighbours=k,
            feature=trial.feature,
        )
        results.append(Result(row, None, outcome))
    return results


def _neighbours(references: Tensor, queries: Tensor, k: int) -> csr_matrix:
    """Which references are the nearest to each query, as a matrix of ones, [m, n]."""
    columns = nearest(references, queries, k)[1].cpu().numpy()
    count = len(columns)
    ones, starts = np.ones(columns.size), np.arange(0, columns.size + 1, k)
    return csr_matrix((ones, columns.ravel(), starts), shape=(count, len(references)))


def _spread(
    graph: csr_matrix, to_test: csr_matrix, trial: Trial, labelled: LabelSet, alpha: float
) -> Tensor:
    """Shares of each class for the test images, [m, C]."""
    count, classes = graph.shape[0], trial.train.classes
    labels = np.full(count, _UNLABELLED)
    labels[labelled.positions.numpy()] = trial.train.labels[labelled.positions].numpy()
    # The images stand for themselves by number: the graph is there already.
    model = LabelSpreading(kernel=lambda *_: graph, alpha=alpha, max_iter=_MOST_ROUNDS)
    model.fit(np.arange(count)[:, None], labels)
    found = to_test @ model.label_distributions_
    totals = found.sum(axis=1, keepdims=True)
    shares = np.full((found.shape[0], len(classes)), 0.0)
    shares[:, model.classes_] = np.divide(found, totals, where=totals > 0, out=np.zeros_like(found))
    shares[totals[:, 0] == 0] = 1 / len(classes)  # no label has come so far
    return torch.from_numpy(shares).float()
