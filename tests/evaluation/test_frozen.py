import pytest
import torch
from sklearn.linear_model import LogisticRegression

from msn.errors import UserError
from msn.evaluation import frozen
from msn.evaluation.frozen import Logistic, best_lambds, folds_of, knn_results, logistic_results
from msn.evaluation.logistic import centre_and_normalise
from msn.evaluation.sets import FeatureSet, LabelSet, Trial
from tests.evaluation.toys import LOGISTIC, toy_features

CPU = torch.device("cpu")
TRAIN = toy_features(30, 4, 12, spread=1.5, seed=0)
TEST = toy_features(25, 4, 12, spread=1.5, seed=1)


def label_sets(per_class, count):
    by_class = torch.arange(120).view(4, 30)
    return [
        LabelSet(str(per_class), f"seed {s}", by_class[:, s : s + per_class].flatten())
        for s in range(count)
    ]


def results(sets, test=TEST, **changes):
    trial = Trial("msn", "class_token", sets, TRAIN, test, CPU)
    return logistic_results(trial, Logistic(**{**LOGISTIC, **changes}))


def test_accuracies_are_those_of_scikit_learn_on_the_same_sets():
    sets = label_sets(5, 3)
    (result,) = results(sets, lambd=0.5)
    rows, test_rows = centre_and_normalise(TRAIN.features), centre_and_normalise(TEST.features)
    for labelled, top1 in zip(sets, result.row["top1"], strict=True):
        model = LogisticRegression(C=1 / 0.5, fit_intercept=False, tol=1e-10, max_iter=10_000)
        model.fit(rows[labelled.positions].numpy(), TRAIN.labels[labelled.positions].numpy())
        assert top1 == pytest.approx(model.score(test_rows.numpy(), TEST.labels.numpy()))
    assert result.row["top1_mean"] == pytest.approx(sum(result.row["top1"]) / 3)
    assert result.row["lambda"] == pytest.approx(0.5 / 20)
    assert result.row["splits"] == 3


def test_the_kept_head_is_that_of_the_first_set():
    (result,) = results(label_sets(5, 2))
    head = result.head
    assert head is not None
    scores = centre_and_normalise(TEST.features) @ head.weight.T
    accuracy = (scores.argmax(dim=1) == TEST.labels).double().mean()
    assert float(accuracy) == result.row["top1"][0]
    assert (head.split, head.centred, head.normalised, head.bias) == ("seed 0", True, True, None)


def test_an_intercept_becomes_the_bias_of_the_head():
    (result,) = results(label_sets(5, 1), intercept=True)
    head = result.head
    assert head is not None
    assert head.bias is not None
    scores = centre_and_normalise(TEST.features) @ head.weight.T + head.bias
    accuracy = (scores.argmax(dim=1) == TEST.labels).double().mean()
    assert float(accuracy) == result.row["top1"][0]


def test_fixed_and_cross_validated_lambda_are_both_reported():
    (result,) = results(label_sets(5, 3), lambd_grid=[0.0025, 0.25, 25.0])
    other = result.row["cross_validated"]
    assert result.row["lambda_choice"] == "fixed"
    assert result.row["lambd"] == 0.0025
    assert len(other["lambd"]) == 3
    for lambd, strength, top1, number in zip(
        other["lambd"], other["lambda"], other["top1"], range(3), strict=True
    ):
        assert strength == pytest.approx(lambd / 20)
        (alone,) = results([label_sets(5, 3)[number]], lambd=lambd)
        assert top1 == alone.row["top1"][0]


def test_test_images_have_no_say_in_lambda():
    sets = label_sets(5, 3)
    (seen,) = results(sets, lambd_grid=[0.0025, 0.25, 25.0])
    shuffled = FeatureSet(-TEST.features, TEST.labels.flip(0), TEST.classes)
    (other,) = results(sets, shuffled, lambd_grid=[0.0025, 0.25, 25.0])
    assert other.row["cross_validated"]["lambd"] == seen.row["cross_validated"]["lambd"]
    assert other.row["top1"] != seen.row["top1"]


def test_cross_validation_prefers_what_generalises():
    # Oracle: leave-one-out by hand with scikit-learn.
    (labelled,) = label_sets(4, 1)
    rows = centre_and_normalise(TRAIN.features)[labelled.positions].double().numpy()
    labels = TRAIN.labels[labelled.positions].numpy()
    right = {}
    for lambd in (0.0025, 0.25, 25.0):
        right[lambd] = 0
        for fold in folds_of(torch.from_numpy(labels), 4, of=0):
            model = LogisticRegression(C=1 / lambd, fit_intercept=False, tol=1e-10, max_iter=10_000)
            model.fit(rows[fold.train.numpy()], labels[fold.train.numpy()])
            held_out = fold.held_out.numpy()
            right[lambd] += int((model.predict(rows[held_out]) == labels[held_out]).sum())
    (result,) = results([labelled], lambd=None, lambd_grid=list(right), folds=4)
    assert right[result.row["lambd"]] == max(right.values())
    assert result.row["lambda_choice"] == "cross-validation"


def test_one_image_a_class_reports_the_fixed_value_alone():
    (result,) = results(label_sets(1, 2), lambd_grid=[0.0025, 0.25])
    assert "cross_validated" not in result.row


def test_one_image_a_class_without_a_fixed_value_is_refused():
    with pytest.raises(UserError, match="give protocol.logistic.lambd"):
        results(label_sets(1, 2), lambd=None, lambd_grid=[0.0025, 0.25])


def test_sets_of_unequal_size_share_a_row():
    sets = [
        LabelSet("10%", "seed 0", torch.tensor([0, 1, 30, 31, 60, 90])),
        LabelSet("10%", "seed 1", torch.tensor([2, 32, 62, 92])),
    ]
    (result,) = results(sets)
    alone = [results([labelled])[0].row["top1"][0] for labelled in sets]
    assert result.row["top1"] == alone


def test_two_runs_print_the_same_digits():
    sets = label_sets(5, 4)
    first, second = (results(sets, lambd_grid=[0.0025, 0.25])[0].row for _ in range(2))
    assert first == second


def test_knn_rows_tell_numbers_of_neighbours_apart():
    labelled = LabelSet("all", "all", torch.arange(120))
    one, ten = knn_results(Trial("msn", "class_token", [labelled], TRAIN, TEST, CPU), [1, 10], 0.07)
    assert (one.row["variant"], ten.row["variant"]) == ("k=1", "k=10")
    assert one.row["lambda"] is None
    assert one.row["labels"] == "all"
    cosines = (
        torch.nn.functional.normalize(TEST.features)
        @ torch.nn.functional.normalize(TRAIN.features).T
    )
    expected = (TRAIN.labels[cosines.argmax(dim=1)] == TEST.labels).double().mean()
    assert one.row["top1_mean"] == float(expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lambd": 0.0}, "lambd=0.0: must be > 0"),
        ({"lambd": None}, "give lambd, or lambd_grid"),
        ({"lambd_grid": [1.0, -1.0]}, "lambd_grid: must be > 0"),
        ({"folds": 1}, "folds=1: must be >= 2"),
        ({"tolerance": 0.0}, "tolerance=0.0: must be > 0"),
    ],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        Logistic(**{**LOGISTIC, **change})


def test_scores_in_pieces_choose_and_count_the_same(monkeypatch):
    settings = {"lambd": None, "lambd_grid": [0.01, 1.0, 100.0]}
    (whole,) = results(label_sets(5, 2), **settings)
    monkeypatch.setattr(frozen, "_MAX_SCORES", 24)
    (pieces,) = results(label_sets(5, 2), **settings)
    assert pieces.row["lambd"] == whole.row["lambd"]
    assert pieces.row["top1"] == whole.row["top1"]


def test_regression_is_solved_on_the_cpu_where_a_device_has_no_double_precision():
    settings, sets = Logistic(**LOGISTIC), label_sets(5, 1)
    trials = [
        Trial("msn", "class_token", sets, TRAIN, TEST, torch.device(name))
        for name in ("mps", "cpu")
    ]
    on = [logistic_results(trial, settings)[0].row for trial in trials]
    assert on[0]["top1"] == on[1]["top1"]


def test_every_image_is_held_out_once_and_classes_evenly():
    labels = torch.tensor([0] * 13 + [1] * 12 + [2] * 5)
    folds = folds_of(labels, 5, of=3)
    assert [fold.of for fold in folds] == [3] * 5
    held_out = torch.cat([fold.held_out for fold in folds])
    assert sorted(held_out.tolist()) == list(range(30))
    for fold in folds:
        assert set(fold.train.tolist()) == set(range(30)) - set(fold.held_out.tolist())
        counts = torch.bincount(labels[fold.held_out], minlength=3)
        assert counts[0] in (2, 3)
        assert counts[1] in (2, 3)
        assert counts[2] == 1
        assert len(fold.held_out) == 6  # folds of one size


def test_fewer_images_than_folds_leave_one_out():
    folds = folds_of(torch.tensor([0, 1, 0, 1]), 5, of=0)
    assert len(folds) == 2
    for fold in folds:
        assert len(fold.held_out) == 2


def test_one_image_a_class_cannot_be_cross_validated():
    assert folds_of(torch.tensor([0, 1, 2]), 5, of=0) == []


def test_accuracy_decides_then_log_loss_then_the_stronger_value():
    grid = [0.1, 1.0, 10.0]
    accuracy = torch.tensor([[3.0, 5, 4], [5, 5, 1], [5, 5, 5]])
    log_loss = torch.tensor([[1.0, 9, 1], [2, 3, 1], [1, 1, 1]])
    assert best_lambds(accuracy, log_loss, grid) == [1.0, 0.1, 10.0]


def test_folds_keep_groups_whole_and_classes_even():
    generator = torch.Generator().manual_seed(0)
    groups = torch.randint(12, (90,), generator=generator)
    labels = torch.randint(3, (90,), generator=generator)
    folds = folds_of(labels, 4, of=2, groups=groups)
    assert len(folds) == 4
    assert torch.cat([fold.held_out for fold in folds]).sort().values.tolist() == list(range(90))
    for fold in folds:
        assert not set(groups[fold.train].tolist()) & set(groups[fold.held_out].tolist())
        shares = torch.bincount(labels[fold.held_out], minlength=3) / torch.bincount(labels)
        assert bool(((shares > 0.1) & (shares < 0.4)).all())
    assert len(folds_of(labels, 5, of=0, groups=groups % 2)) == 2
    assert folds_of(labels, 5, of=0, groups=groups * 0) == []


def test_one_group_cannot_choose_lambda():
    train = TRAIN._replace(groups=torch.zeros(120, dtype=torch.long))
    trial = Trial("msn", "class_token", label_sets(5, 1), train, TEST, CPU)
    with pytest.raises(UserError, match="all images are of one group"):
        logistic_results(trial, Logistic(**{**LOGISTIC, "lambd": None, "lambd_grid": [1.0]}))
    kept = logistic_results(trial, Logistic(**{**LOGISTIC, "lambd_grid": [1.0]}))
    assert "cross_validated" not in kept[0].row
