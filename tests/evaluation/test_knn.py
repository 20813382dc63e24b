import torch

from msn.evaluation.neighbours import knn_predictions
from tests.evaluation.toys import toy_features


def test_each_number_of_neighbours_gives_what_it_gives_alone():
    train = toy_features(20, 3, 6, spread=1.5, seed=0)
    test = toy_features(10, 3, 6, spread=1.5, seed=1)
    for temperature in (None, 0.07):
        settings = {"temperature": temperature, "num_classes": 3}
        several = knn_predictions(
            train.features, train.labels, test.features, neighbours=[20, 1, 5], **settings
        )
        for k, predicted in zip([20, 1, 5], several, strict=True):
            (alone,) = knn_predictions(
                train.features, train.labels, test.features, neighbours=[k], **settings
            )
            assert torch.equal(predicted, alone)


def test_separated_classes_are_told_apart():
    train = toy_features(20, 3, 6, spread=0.1, seed=0)
    test = toy_features(10, 3, 6, spread=0.1, seed=1)
    (predicted,) = knn_predictions(
        train.features, train.labels, test.features, neighbours=[5], temperature=None, num_classes=3
    )
    assert torch.equal(predicted, test.labels)


def test_between_as_many_votes_the_larger_sum_of_cosines_wins():
    """Of three classes with two neighbours each the last has the closest pair, not the closest."""
    cosines = torch.tensor([0.90, 0.50, 0.80, 0.55, 0.75, 0.70])
    references = torch.stack([cosines, (1 - cosines.square()).sqrt()], dim=1)
    (predicted,) = knn_predictions(
        references,
        torch.tensor([0, 0, 1, 1, 2, 2]),
        torch.tensor([[1.0, 0.0]]),
        neighbours=[6],
        temperature=None,
        num_classes=3,
    )
    assert predicted.item() == 2
