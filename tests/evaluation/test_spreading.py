import logging

import numpy as np
import pytest
import torch
from sklearn.semi_supervised import LabelSpreading

from msn.errors import UserError
from msn.evaluation.logistic import centre_and_normalise
from msn.evaluation.sets import LabelSet, Trial
from msn.evaluation.spreading import Spreading, spreading_results
from msn.evaluation.table import markdown_table
from tests.evaluation.test_protocols import kshot
from tests.evaluation.toys import ToyImages, toy_features

CPU = torch.device("cpu")
TRAIN = toy_features(30, 4, 12, spread=1.0, seed=0)
TEST = toy_features(25, 4, 12, spread=1.0, seed=1)


def label_sets(per_class, count):
    by_class = torch.arange(120).view(4, 30)
    return [
        LabelSet(str(per_class), f"seed {s}", by_class[:, s : s + per_class].flatten())
        for s in range(count)
    ]


@pytest.mark.parametrize(("neighbours", "alpha"), [(7, 0.2), (4, 0.8)])
def test_predictions_are_those_of_scikit_learn_on_the_same_sets(neighbours, alpha):
    sets = label_sets(2, 3)
    trial = Trial("msn", "class_token", sets, TRAIN, TEST, CPU)
    (result,) = spreading_results(
        trial, Spreading(neighbours=neighbours, alpha=alpha, most_images=100_000)
    )
    rows, test_rows = (centre_and_normalise(s.features).numpy() for s in (TRAIN, TEST))
    for at, labelled in enumerate(sets):
        labels = np.full(120, -1)
        labels[labelled.positions] = TRAIN.labels[labelled.positions]
        model = LabelSpreading(kernel="knn", n_neighbors=neighbours, alpha=alpha, max_iter=1000)
        with np.errstate(invalid="ignore"):
            theirs = model.fit(rows, labels).predict_proba(test_rows)
        known = np.isfinite(theirs).all(axis=1)
        assert known.mean() > 0.9
        ours = result.outcome.predicted[at].numpy()
        assert (ours[known] == theirs[known].argmax(axis=1)).all()
        if at == 0:
            np.testing.assert_allclose(result.outcome.scores[known], theirs[known], atol=1e-6)
    assert result.row["splits"] == 3
    assert result.row["top1_mean"] > 0.6


def test_a_class_without_a_label_and_an_image_without_neighbours_are_no_fault():
    some = LabelSet("2 images", "one", torch.tensor([0, 60]))  # classes 0 and 2 of four
    trial = Trial("msn", "class_token", [some], TRAIN, TEST, CPU)
    (result,) = spreading_results(trial, Spreading(neighbours=2, alpha=0.2, most_images=100_000))
    assert bool(result.outcome.scores.isfinite().all())
    assert result.outcome.scores.sum(dim=1).numpy() == pytest.approx(1)


def test_spreading_is_a_line_below_the_regression_and_sees_all_images():
    protocol = kshot(
        spreading={"neighbours": 7, "alpha": 0.2, "most_images": 100_000}, knn_neighbours=None
    )
    sets = protocol.label_sets(ToyImages(30, 4))
    assert len(sets[-1].positions) == 120
    rows = [r.row for r in protocol.results(Trial("msn", "x", sets, TRAIN, TEST, CPU))]
    assert [(r["classifier"], r["labels"]) for r in rows] == [
        *(("logistic", k) for k in "12"),
        *(("spreading", k) for k in "12"),
    ]
    lines = markdown_table(rows).splitlines()
    assert lines[0] == "| backbone | logistic 1 per class | logistic 2 per class |"
    assert lines[3].startswith(f"| msn, spreading | {100 * rows[2]['top1_mean']:.1f} +- ")


def test_many_images_leave_spreading_out_and_are_not_looked_at(caplog):
    protocol = kshot(spreading={"neighbours": 7, "alpha": 0.2, "most_images": 119})
    protocol.knn_neighbours = None
    with caplog.at_level(logging.INFO):
        plan = protocol.plan(ToyImages(30, 4))
    assert "120 training images are more than protocol.spreading.most_images=119" in caplog.text
    assert max(len(labelled.positions) for labelled in plan.sets) == 8
    rows = [r.row for r in protocol.results(Trial("msn", "x", plan.sets, TRAIN, TEST, CPU))]
    assert {row["classifier"] for row in rows} == {"logistic"}


def test_short_classes_are_refused_taken_or_left_out():
    keep = torch.tensor([*range(32), *range(60, 120)])  # class 1 has two images
    train = TRAIN._replace(features=TRAIN.features[keep], labels=TRAIN.labels[keep])
    images = ToyImages(23, 4)
    images.labels = train.labels
    with pytest.raises(UserError, match="class1 has only 2 images .*short_classes=take_all"):
        kshot(shots=[1, 5]).label_sets(images)
    for rule, of_five in (("take_all", [5, 2, 5, 5]), ("leave_out", [5, 0, 5, 5])):
        protocol = kshot(shots=[1, 5], short_classes=rule, splits=1)
        one, five, _ = protocol.label_sets(images)
        assert torch.bincount(train.labels[one.positions]).tolist() == [1, 1, 1, 1]
        counts = torch.bincount(train.labels[five.positions], minlength=4)
        assert counts.tolist() == of_five
        trial = Trial("msn", "x", protocol.label_sets(images), train, TEST, CPU)
        rows = {r.row["labels"]: r.row for r in protocol.results(trial)}
        assert rows["5"]["short_classes"] == {"rule": rule, "images": {"class1": 2}}
        assert "short_classes" not in rows["1"]
        assert "5 per class: class1 2 images" in markdown_table(list(rows.values()))
        assert (rows["5"]["recall"]["class1"]["recall"] > 0) == (rule == "take_all")
    with pytest.raises(UserError, match="must be one of refuse"):
        kshot(short_classes="some")
