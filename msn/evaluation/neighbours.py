"""Frozen features by their neighbours: votes, label spreading, effective rank and alignment.

Legend: n reference rows, m query rows, D feature width, C classes, k neighbours.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import csr_matrix
from sklearn.semi_supervised import LabelSpreading
from torch import Tensor

from msn.errors import UserError
from msn.evaluation.logistic import centre_and_normalise
from msn.evaluation.sets import LabelSet, Result, Trial, make_row
from msn.schema import Range, check_ranges

# Similarities held at once; bounds memory at about 256 MiB of float32.
_MAX_SIMILARITIES = 2**26


def nearest(references: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the k references of largest cosine to each query.

    Args:
        references: [n, D], any scale; zero rows have cosine 0 to everything.
        queries: [m, D].
        k: in [1, n].

    Returns:
        Cosines, descending, [m, k], and rows of `references`, [m, k].

    Raises:
        UserError: if k is outside [1, n].
    """
    if not 1 <= k <= len(references):
        raise UserError(f"k={k} neighbours: must be in [1, {len(references)}] (labelled images)")
    references, queries = F.normalize(references, dim=1), F.normalize(queries, dim=1)
    rows = max(1, _MAX_SIMILARITIES // len(references))
    found = [(part @ references.T).topk(k, dim=1) for part in queries.split(rows)]
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])


def majority_votes(cosines: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Count neighbours of each class; between equal counts the larger sum of cosines wins.

    Args:
        cosines: of the neighbours, in [-1, 1], [m, k].
        labels: of the neighbours, in [0, C), [m, k].
        num_classes: C.

    Returns:
        Scores whose argmax is the vote, [m, C]; their whole parts are the counts where C has votes.
    """
    # Summed cosines lie in [-k, k]; scaled into [0, 0.5] they order ties and nothing else.
    k = cosines.shape[1]
    return _tally(1 + (cosines.clamp(-1, 1) + 1) / (4 * k), labels, num_classes)


def weighted_votes(cosines: Tensor, labels: Tensor, num_classes: int, temperature: float) -> Tensor:
    """Sum exp(cosine / temperature) of the neighbours of each class (weighted kNN).

    Args:
        cosines: of the neighbours, [m, k].
        labels: of the neighbours, in [0, C), [m, k].
        num_classes: C.
        temperature: > 0; 0.07 is customary.

    Returns:
        Scores relative to the nearest neighbour's weight, [m, C].

    Raises:
        UserError: if the temperature is not positive.
    """
    if not temperature > 0:
        raise UserError(f"kNN temperature must be > 0, got {temperature}")
    # Relative to the nearest, so that small temperatures do not overflow.
    nearest_cosine = cosines.amax(dim=1, keepdim=True)
    return _tally(torch.exp((cosines - nearest_cosine) / temperature), labels, num_classes)


def rankme(features: Tensor) -> float:
    """Effective rank: exp of the entropy of normalised singular values (RankMe, arXiv 2210.02885).

    Args:
        features: [n, D], not centred.

    Returns:
        In [1, min(n, D)]; near 1 when features have collapsed to one direction. 0 if all are zero,
        nan if one is not finite, as after a training that has diverged.
    """
    if not features.isfinite().all():
        return math.nan
    return effective_rank(torch.linalg.svdvals(features.to(torch.float64)))


def effective_rank(values: Tensor) -> float:
    """Exp of the entropy of values >= 0 that are scaled to sum 1; 0 if all are zero."""
    total = values.sum()
    if total == 0:
        return 0.0
    share = values / total
    return float(torch.exp(-torch.special.xlogy(share, share).sum()))


def alignment(first: Tensor, second: Tensor) -> Tensor:
    """Mean squared distance of unit-length features of two views of each image (arXiv 2005.10242).

    Args:
        first: [n, D], any scale.
        second: of the same images, [n, D].

    Returns:
        Scalar in [0, 4]; 0 where views do not differ.
    """
    return (F.normalize(first, dim=1) - F.normalize(second, dim=1)).square().sum(dim=1).mean()


def uniformity(features: Tensor) -> Tensor:
    """Log of the mean Gaussian potential exp(-2 d^2) of pairs of images (arXiv 2005.10242).

    Args:
        features: [n, D], n >= 2, any scale.

    Returns:
        Scalar in [-8, 0]; 0 where all features point one way, smaller where they spread evenly.
    """
    return F.pdist(F.normalize(features, dim=1)).square().mul(-2).exp().mean().log()


def leave_one_out(
    features: Tensor, labels: Tensor, *, k: int, num_classes: int, groups: Tensor | None = None
) -> Tensor:
    """Which rows their k nearest others classify rightly by majority under cosine, [n] of bool.

    Args:
        features: [n, D], n > k.
        labels: their classes, [n].
        k: neighbours, >= 1; fewer where a group leaves fewer others.
        num_classes: C.
        groups: numbers of at least two groups, [n]; a row's own group does not vote. None: each
            row is its own.
    """
    own = torch.arange(len(features)) if groups is None else groups
    largest = int(torch.unique(own, return_counts=True)[1].max())
    own, k = own.to(features.device), min(k, len(features) - largest)
    cosines, indices = nearest(features, features, k + largest)
    others = own[indices] != own[:, None]
    # A row is its own nearest, unless others equal it; the first k of the others vote.
    order = others.logical_not().to(torch.uint8).argsort(dim=1, stable=True)[:, :k]
    voters = labels[indices.gather(1, order)]
    votes = majority_votes(cosines.gather(1, order), voters, num_classes)
    return votes.argmax(dim=1) == labels


def _tally(weights: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    scores = weights.new_zeros(len(weights), num_classes)
    return scores.scatter_add_(1, labels, weights)


def knn_scores(
    references: Tensor,
    labels: Tensor,
    queries: Tensor,
    *,
    neighbours: Sequence[int],
    temperature: float | None,
    num_classes: int,
) -> Iterator[Tensor]:
    """Votes of the nearest labelled features under cosine.

    Args:
        references: labelled features, [n, D].
        labels: their classes, [n].
        queries: features to classify, [m, D].
        neighbours: numbers k of neighbours, each in [1, n].
        temperature: weights votes by exp(cosine / temperature); None counts them equally, and
            between classes with as many votes the larger sum of cosines wins.
        num_classes: C.

    Yields:
        For each k scores whose argmax is the prediction, [m, C].

    Raises:
        UserError: if a k or the temperature is out of range.
    """
    cosines, indices = nearest(references, queries, max(neighbours))
    voters = labels[indices]
    for k in neighbours:
        if temperature is None:
            yield majority_votes(cosines[:, :k], voters[:, :k], num_classes)
        else:
            yield weighted_votes(cosines[:, :k], voters[:, :k], num_classes, temperature)


def knn_predictions(references: Tensor, labels: Tensor, queries: Tensor, **settings: Any) -> Tensor:
    """A row of predicted classes for each k, [len(neighbours), m]; see `knn_scores`."""
    found = knn_scores(references, labels, queries, **settings)
    return torch.stack([scores.argmax(dim=1) for scores in found])


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

    Label spreading is scikit-learn's (Zhou et al. 2004). Its graph is built once for all label
    sets. Images without a label take part; test images do not: each gets the mean of what its
    nearest training images have.

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
