"""k nearest neighbours on frozen features: no training, one number that describes the space."""

from collections.abc import Sequence

import torch
from torch import Tensor

from msn.method.geometry import majority_votes, nearest, weighted_votes


def knn_predictions(
    references: Tensor,
    labels: Tensor,
    queries: Tensor,
    *,
    neighbours: Sequence[int],
    temperature: float | None,
    num_classes: int,
) -> Tensor:
    """Classify by the nearest labelled features under cosine.

    Args:
        references: labelled features, [n, D].
        labels: their classes, [n].
        queries: features to classify, [m, D].
        neighbours: numbers k of neighbours, each in [1, n].
        temperature: weights votes by exp(cosine / temperature); None counts them equally, and
            between classes with as many votes the larger sum of cosines wins.
        num_classes: C.

    Returns:
        A row of predicted classes for each k, [len(neighbours), m].

    Raises:
        UserError: if a k or the temperature is out of range.
    """
    cosines, indices = nearest(references, queries, max(neighbours))
    voters = labels[indices]
    predictions = []
    for k in neighbours:
        if temperature is None:
            scores = majority_votes(cosines[:, :k], voters[:, :k], num_classes)
        else:
            scores = weighted_votes(cosines[:, :k], voters[:, :k], num_classes, temperature)
        predictions.append(scores.argmax(dim=1))
    return torch.stack(predictions)
