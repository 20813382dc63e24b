"""Every protocol on frozen features, from images to rows, against scikit-learn on the same sets."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.semi_supervised import LabelSpreading

from msn.evaluation.linear import Linear
from msn.evaluation.lowshot import evaluate
from msn.evaluation.protocols import KNN, Fraction
from tests.evaluation.test_protocols import kshot
from tests.evaluation.toys import FEATURES, LOGISTIC, ToyImages, toy_backbone

TRAIN, TEST = ToyImages(14), ToyImages(9, seed=1)
SETTINGS = {**LOGISTIC, "lambd": 0.05}
TEMPERATURE = 0.1


@pytest.fixture(scope="module")
def rows():
    """Class tokens before the last norm, image by image, centred and of unit length."""
    backbone = toy_backbone()
    found = []
    with torch.no_grad():
        for images in (TRAIN, TEST):
            tokens = [
                backbone.trunk.forward_features(backbone.transform(images[i])[None], norm=False)
                for i in range(len(images))
            ]
            features = torch.cat(tokens)[:, 0].double().numpy()
            features -= features.mean(axis=1, keepdims=True)
            found.append(features / np.linalg.norm(features, axis=1, keepdims=True))
    return found


def logistic(train, labels, labelled, test):
    model = LogisticRegression(
        C=1 / SETTINGS["lambd"], fit_intercept=False, tol=1e-9, max_iter=9999
    )
    return model.fit(train[labelled], labels[labelled]).predict(test)


def spreading(train, labels, labelled, test):
    known = np.full(len(labels), -1)
    known[labelled] = labels[labelled]
    model = LabelSpreading(kernel="knn", n_neighbors=5, alpha=0.3, max_iter=1000)
    return model.fit(train, known).predict(test)


def neighbours(k, weights="uniform"):
    def predict(train, labels, labelled, test):
        model = KNeighborsClassifier(k, metric="cosine", weights=weights)
        return model.fit(train[labelled], labels[labelled]).predict(test)

    return predict


def weighted(distances):
    return np.exp((1 - distances) / TEMPERATURE)


PROTOCOLS = {
    "kshot": (
        kshot(
            shots=[2, 5],
            logistic=SETTINGS,
            knn_neighbours=1,
            spreading={"neighbours": 5, "alpha": 0.3, "most_images": 100_000},
        ),
        {"logistic": logistic, "spreading": spreading, "knn": neighbours(1)},
    ),
    "fraction": (
        Fraction(
            fractions=[0.3, 1.0],
            splits=2,
            seed=3,
            write_lists=None,
            logistic=SETTINGS,
            knn_neighbours=None,
            features=FEATURES,
        ),
        {"logistic": logistic},
    ),
    "knn": (
        KNN(neighbours=[7], temperature=TEMPERATURE, features=FEATURES),
        {"knn": neighbours(7, weighted)},
    ),
    "linear": (Linear(logistic=SETTINGS, sgd=None, features=FEATURES), {"logistic": logistic}),
}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_protocol_gives_the_accuracies_of_scikit_learn(rows, name):
    protocol, oracles = PROTOCOLS[name]
    cpu = torch.device("cpu")
    found = evaluate(protocol, [toy_backbone()], TRAIN, TEST, num_workers=0, device=cpu)
    sets = {(one.labels, one.split): one.positions.numpy() for one in protocol.label_sets(TRAIN)}
    labels, truth = TRAIN.labels.numpy(), TEST.labels.numpy()
    seen = set()
    for row in (result.row for result in found):
        oracle = oracles[row["classifier"]]
        seen.add(row["classifier"])
        balanced = []
        for split, top1 in zip(row["split_names"], row["top1"], strict=True):
            said = oracle(rows[0], labels, sets[row["labels"], split], rows[1])
            assert top1 == pytest.approx(np.mean(said == truth)), (row["labels"], split)
            balanced.append(balanced_accuracy_score(truth, said))
        assert row["balanced_mean"] == pytest.approx(np.mean(balanced))
    assert seen == set(oracles)
