import itertools

import pytest
import torch
import torch.nn.functional as F

from msn.errors import UserError
from msn.evaluation.label_choice import cover_prototypes, k_medoids, share_out
from tests.evaluation.toys import toy_features

CLUSTERS, WIDTH = 4, 8


def blobs(per_cluster=12, spread=0.1, seed=0):
    return toy_features(per_cluster, CLUSTERS, WIDTH, spread=spread, seed=seed)


def test_medoids_take_one_image_of_every_cluster_and_the_largest_first():
    pool = blobs()
    keep = torch.arange(len(pool.labels))[5:]  # cluster 0 is smaller than the others
    choice = k_medoids(pool.features[keep], CLUSTERS)
    assert sorted(pool.labels[keep][choice.positions].tolist()) == list(range(CLUSTERS))
    assert pool.labels[keep][choice.positions[-1]] == 0
    assert choice.sizes.tolist() == [12, 12, 12, 7]


def test_medoids_find_the_best_of_all_pairs():
    rows = torch.randn(14, 5, generator=torch.Generator().manual_seed(3))
    unit = F.normalize(rows - rows.mean(dim=0), dim=1)

    def covered(pair):
        return float((unit @ unit[list(pair)].T).max(dim=1).values.sum())

    best = max(map(covered, itertools.combinations(range(14), 2)))
    assert covered(k_medoids(rows, 2).positions.tolist()) >= 0.95 * best


def test_prototypes_give_their_most_typical_image():
    cosines = torch.tensor([[0.9, 0.1, 0.0], [0.8, 0.2, 0.0], [0.1, 0.7, 0.0], [0.2, 0.6, 0.0]])
    choice = cover_prototypes(cosines, torch.randn(4, 3), 2)
    assert sorted(choice.positions.tolist()) == [0, 2]  # the third prototype is not used
    assert sorted(choice.groups.tolist()) == [0, 1]


def test_a_budget_above_the_used_prototypes_is_shared_out_by_use():
    assert share_out(torch.tensor([6, 0, 2, 1]), 5).tolist() == [3, 0, 1, 1]
    assert share_out(torch.tensor([6, 0, 2, 1]), 9).tolist() == [6, 0, 2, 1]


def test_a_budget_below_the_used_prototypes_takes_those_that_stand_for_the_others():
    pool = blobs()
    # Three prototypes for each of four clusters; four labels should go to four clusters.
    means = torch.stack([pool.features[pool.labels == c].mean(dim=0) for c in range(CLUSTERS)])
    prototypes = means.repeat_interleave(3, dim=0) + 0.2 * torch.randn(
        12, WIDTH, generator=torch.Generator().manual_seed(0)
    )
    cosines = F.normalize(pool.features, dim=1) @ F.normalize(prototypes, dim=1).T
    choice = cover_prototypes(cosines, pool.features, CLUSTERS)
    assert sorted(pool.labels[choice.positions].tolist()) == list(range(CLUSTERS))


@pytest.mark.parametrize("budget", [0, 49])
def test_a_budget_that_there_are_no_images_for_is_refused(budget):
    pool = blobs()
    with pytest.raises(UserError, match=r"must be in \[1, 48\]"):
        k_medoids(pool.features, budget)
