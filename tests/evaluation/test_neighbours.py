import logging
import math

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from sklearn.semi_supervised import LabelSpreading

from msn.errors import UserError
from msn.evaluation import neighbours
from msn.evaluation.logistic import centre_and_normalise
from msn.evaluation.neighbours import (
    Spreading,
    majority_votes,
    nearest,
    rankme,
    spreading_results,
    weighted_votes,
)
from msn.evaluation.sets import LabelSet, Trial
from msn.evaluation.table import markdown_table
from tests.evaluation.test_protocols import kshot
from tests.evaluation.toys import ToyImages, toy_features


@pytest.fixture
def rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    references = torch.randn(60, 8, generator=generator, dtype=torch.float64)
    queries = torch.randn(25, 8, generator=generator, dtype=torch.float64)
    return references, queries, torch.randint(4, (60,), generator=generator)


def test_nearest_finds_what_a_full_sort_of_cosines_finds(rows, monkeypatch):
    references, queries, _ = rows
    # Blocks of three queries: the last one is not full.
    monkeypatch.setattr(neighbours, "_MAX_SIMILARITIES", 3 * len(references))
    cosines, indices = nearest(references, queries, 7)
    for q, query in enumerate(queries):
        every = torch.stack([query @ r / query.norm() / r.norm() for r in references])
        order = every.argsort(descending=True)[:7]
        assert indices[q].tolist() == order.tolist()
        torch.testing.assert_close(cosines[q], every[order], rtol=0, atol=1e-12)


@pytest.mark.parametrize("k", [0, 61])
def test_impossible_number_of_neighbours_is_refused(rows, k):
    with pytest.raises(UserError, match=r"must be in \[1, 60\]"):
        nearest(rows[0], rows[1], k)


def test_majority_counts_more_than_closeness():
    cosines = torch.tensor([[0.99, -0.9, -0.95]])
    labels = torch.tensor([[0, 1, 1]])
    assert majority_votes(cosines, labels, 3).argmax().item() == 1


def test_tie_goes_to_the_class_of_larger_summed_cosines():
    cosines = torch.tensor([[0.9, 0.8, 0.7, 0.2]])
    labels = torch.tensor([[2, 1, 1, 2]])
    assert majority_votes(cosines, labels, 3).argmax().item() == 1


def test_majority_agrees_with_scikit_learn_where_there_is_no_tie(rows):
    references, queries, labels = rows
    cosines, indices = nearest(references, queries, 9)
    ours = majority_votes(cosines, labels[indices], 4)
    counts = torch.stack([(labels[indices] == c).sum(dim=1) for c in range(4)], dim=1)
    sure = counts.topk(2, dim=1).values.diff(dim=1)[:, 0] < 0
    other = KNeighborsClassifier(9, metric="cosine").fit(references.numpy(), labels.numpy())
    theirs = torch.from_numpy(other.predict(queries.numpy()))
    assert sure.sum() > 10
    assert torch.equal(ours.argmax(dim=1)[sure], theirs[sure])


def test_weighted_votes_are_sums_of_exponentials_relative_to_the_nearest(rows):
    references, queries, labels = rows
    cosines, indices = nearest(references, queries, 5)
    scores = weighted_votes(cosines, labels[indices], 4, temperature=0.07)
    for q in range(len(queries)):
        expected = [0.0] * 4
        for cosine, index in zip(cosines[q].tolist(), indices[q].tolist(), strict=True):
            expected[int(labels[index])] += math.exp((cosine - float(cosines[q, 0])) / 0.07)
        torch.testing.assert_close(scores[q], torch.tensor(expected, dtype=torch.float64))


def test_tiny_temperature_gives_the_nearest_neighbour_without_overflow(rows):
    references, queries, labels = rows
    cosines, indices = nearest(references, queries, 5)
    scores = weighted_votes(cosines.float(), labels[indices], 4, temperature=1e-4)
    assert torch.isfinite(scores).all()
    assert torch.equal(scores.argmax(dim=1), labels[indices[:, 0]])


def test_temperature_must_be_positive():
    with pytest.raises(UserError, match="temperature must be > 0"):
        weighted_votes(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.long), 2, temperature=0.0)


def test_rankme_counts_equal_directions():
    basis = torch.linalg.qr(torch.randn(20, 20, generator=torch.Generator().manual_seed(0)))[0]
    assert rankme(torch.cat([basis[:6], basis[:6]])) == pytest.approx(6, rel=1e-5)
    assert rankme(torch.ones(10, 5)) == pytest.approx(1, abs=1e-5)
    assert rankme(torch.zeros(10, 5)) == 0


def test_rankme_is_the_entropy_of_singular_values_at_any_scale():
    rows = torch.randn(30, 4, generator=torch.Generator().manual_seed(1)) * torch.tensor(
        [9.0, 3, 1, 0.1]
    )
    values = torch.linalg.svdvals(rows.double())
    share = values / values.sum()
    expected = math.exp(-(share * share.log()).sum())
    assert rankme(rows) == pytest.approx(expected, rel=1e-9)
    assert rankme(1000 * rows) == pytest.approx(expected, rel=1e-5)


def test_alignment_and_uniformity_against_loops(rows):
    first, second = rows[0][:9], rows[0][9:18]
    unit = [[x / x.norm() for x in part] for part in (first, second)]
    aligned = sum(float((a - b).square().sum()) for a, b in zip(*unit, strict=True)) / 9
    assert float(neighbours.alignment(first, second)) == pytest.approx(aligned)
    potentials = [
        math.exp(-2 * float((unit[0][i] - unit[0][j]).square().sum()))
        for i in range(9)
        for j in range(i)
    ]
    expected = math.log(sum(potentials) / len(potentials))
    assert float(neighbours.uniformity(first)) == pytest.approx(expected)
    assert float(neighbours.alignment(first, 3 * first)) == pytest.approx(0)
    assert float(neighbours.uniformity(first[:1].expand(5, -1))) == pytest.approx(0)


@pytest.mark.parametrize("grouped", [False, True])
def test_leaving_one_out_is_what_a_loop_over_the_others_finds(rows, grouped):
    features, _, labels = rows
    features = torch.cat([features, features[:5]])  # some rows have an equal
    labels = torch.cat([labels, labels[:5].flip(0)])
    own = torch.arange(len(features))
    own = own % 4 if grouped else own
    right = []
    for i in range(len(features)):
        others = torch.nonzero(own != own[i])[:, 0]
        cosines, found = nearest(features[others], features[i : i + 1], 7)
        votes = majority_votes(cosines, labels[others][found], 4)
        right.append(bool(votes.argmax() == labels[i]))
    hits = neighbours.leave_one_out(
        features, labels, k=7, num_classes=4, groups=own if grouped else None
    )
    assert hits.tolist() == right


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
