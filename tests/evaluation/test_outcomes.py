import csv
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, f1_score, recall_score

from msn.evaluation import predictions
from msn.evaluation.lowshot import evaluate
from msn.evaluation.outcomes import above, confusion, is_unbalanced, measured, outcome_of
from msn.evaluation.predictions import confusion_table, read_predictions, write_predictions
from msn.evaluation.sets import make_row
from msn.evaluation.table import markdown_table, write_results
from msn.weights.card import floors_note
from tests.evaluation.test_protocols import kshot
from tests.evaluation.toys import ToyImages, toy_backbone

NAMES = list("abcd")
SETS, IMAGES = 5, 300


def guesses(*, right, seed=0):
    """Uneven classes, of which the last is never found in the first set."""
    rng = np.random.default_rng(seed)
    truth = rng.choice(4, IMAGES, p=[0.6, 0.2, 0.15, 0.05])
    said = np.where(rng.random((SETS, IMAGES)) < right, truth, rng.integers(0, 3, (SETS, IMAGES)))
    said[0][said[0] == 3] = 1
    return outcome_of(torch.from_numpy(truth), torch.from_numpy(said), NAMES)


def test_figures_are_those_of_scikit_learn():
    outcome = guesses(right=0.6)
    found, truth, said = measured(outcome), outcome.truth.numpy(), outcome.predicted.numpy()
    theirs = [balanced_accuracy_score(truth, one) for one in said]
    assert found["balanced_mean"] == pytest.approx(np.mean(theirs))
    assert found["balanced_std"] == pytest.approx(np.std(theirs, ddof=1))
    pooled = np.tile(truth, SETS), said.flatten()
    assert found["macro_f1"] == pytest.approx(f1_score(*pooled, average="macro"))
    for name, recall in zip(NAMES, recall_score(*pooled, average=None), strict=True):
        one = found["recall"][name]
        assert one["recall"] == pytest.approx(recall)
        assert one["interval"][0] <= recall <= one["interval"][1]
    for figure in ("balanced", "macro_f1"):
        low, high = found[f"{figure}_interval"]
        assert low < found.get(figure, found["balanced_mean"]) < high
    cells = confusion_matrix(*pooled) / SETS
    np.testing.assert_allclose(confusion(outcome)[:, :-1], cells)


def test_intervals_are_those_of_resampling_by_hand():
    outcome = guesses(right=0.6)
    truth, said = outcome.truth.numpy(), outcome.predicted.numpy()
    rng, drawn = np.random.default_rng(1), []
    for _ in range(300):
        some = rng.integers(0, IMAGES, IMAGES)
        recalls = [
            np.mean([(one[some] == truth[some])[truth[some] == c].mean() for one in said])
            for c in range(4)
        ]
        drawn.append(np.mean(recalls))
    theirs = np.quantile(drawn, [0.025, 0.975])
    np.testing.assert_allclose(measured(outcome)["balanced_interval"], theirs, atol=0.01)


def test_an_unreadable_image_is_wrong_in_its_own_class():
    truth, said = torch.tensor([0, 0, 1, 1]), torch.tensor([[0, 0, 1, 1]])
    unreadable = torch.tensor([True, False, False, False])
    found = measured(outcome_of(truth, said, ["a", "b"], unreadable=unreadable))
    assert (found["top1_mean"], found["balanced_mean"]) == (0.75, 0.75)
    assert (found["recall"]["a"]["recall"], found["recall"]["b"]["recall"]) == (0.5, 1)


def test_a_class_without_test_images_has_no_recall():
    found = measured(outcome_of(torch.tensor([0, 0, 1]), torch.tensor([[0, 2, 1]]), NAMES))
    assert found["recall"]["c"] == {"images": 0, "recall": None, "interval": None}
    assert found["balanced_mean"] == 0.75
    assert json.dumps(found, allow_nan=False)


def row(backbone, outcome, labels="1"):
    return make_row(
        backbone=backbone, classifier="logistic", labels=labels, outcome=outcome, splits=["a"]
    )


def test_what_does_not_beat_its_floors_is_named():
    good, floor = guesses(right=0.9), guesses(right=0.3)
    assert is_unbalanced(row("msn", good))
    won = above(good, floor, balanced=True)
    assert won["metric"] == "balanced"
    assert won["interval"][0] > 0
    lost = above(floor, good, balanced=False)
    assert lost["difference"] == pytest.approx(
        float(floor.correct.double().mean() - good.correct.double().mean())
    )
    assert lost["interval"][1] < 0
    same = above(good, good, balanced=False)
    assert same["interval"] == [0, 0]
    rows = [
        {**row("msn", good), "above": {"random": won, "pixels": same}},
        {**row("msn", good, "5"), "above": {"random": won, "pixels": won}},
    ]
    (line,) = floors_note(rows)
    assert line == (
        "msn does not beat raw pixels (logistic 1 per class) beyond the 95 % interval, in balanced "
        "accuracy (the majority class: top-1)"
    )
    assert line in markdown_table(rows)
    more = [{**rows[0], "labels": k} for k in "123"] + [rows[1]]
    assert "raw pixels (logistic 1, 2, 3 per class) beyond" in floors_note(more)[0]
    assert floors_note([rows[1]]) == []
    assert floors_note([{**rows[0], "above": None}]) == []  # as in older files


def test_uneven_classes_have_a_balanced_column_and_old_rows_are_still_shown():
    uneven = markdown_table([row("msn", guesses(right=0.6))])
    assert "| logistic, balanced 1 per class |" in uneven.splitlines()[0]
    old = {k: v for k, v in row("msn", guesses(right=0.6)).items() if "balanced" not in k}
    old = {k: v for k, v in old.items() if k not in ("recall", "macro_f1", "macro_f1_interval")}
    assert "balanced" not in markdown_table([old])
    even = outcome_of(torch.tensor([0, 1]), torch.tensor([[0, 1]]), ["a", "b"])
    assert "balanced" not in markdown_table([row("msn", even)])


class Uneven(ToyImages):
    """Three classes of 10, 10 and 2 images, named as the toys are."""

    def __init__(self, seed):
        super().__init__(10, seed=seed)
        keep = torch.tensor([*range(22)])
        self.labels, self.pixels = self.labels[keep], self.pixels[keep]
        self.names = self.names[:22]


@pytest.fixture(scope="module")
def results():
    backbones = [toy_backbone(), toy_backbone(1, "random")]
    test = Uneven(1)
    return evaluate(
        kshot(shots=[1, 2]),
        backbones,
        Uneven(0),
        test,
        num_workers=0,
        device=torch.device("cpu"),
        majority=True,
    ), test


def test_the_majority_class_is_a_row_of_every_column(results):
    rows = [result.row for result in results[0]]
    columns = {(r["classifier"], r["labels"]) for r in rows if r["backbone"] == "msn"}
    floor = [r for r in rows if r["backbone"] == "majority"]
    assert {(r["classifier"], r["labels"]) for r in floor} == columns
    assert {r["top1_mean"] for r in floor} == {10 / 22}
    assert {round(r["balanced_mean"], 6) for r in floor} == {round(1 / 3, 6)}
    for own in (r for r in rows if r["backbone"] == "msn"):
        assert {name: one["metric"] for name, one in own["above"].items()} == {
            "random": "balanced",
            "majority": "top1",
        }


@pytest.mark.parametrize("ending", ["parquet", "csv"])
def test_predictions_are_kept_with_names_and_scores(tmp_path, results, monkeypatch, ending):
    found, test = results
    if ending == "csv":
        monkeypatch.setattr(predictions, "find_spec", lambda _: None)
    write_predictions(tmp_path / "p", found, test.names)
    assert [path.name for path in tmp_path.iterdir()] == [f"p.{ending}"]
    lines = read_predictions(tmp_path / "p")
    own = [result for result in found if result.row["backbone"] == "msn"]
    assert len(lines) == len(own) * len(test)
    for at, result in enumerate(own):
        some = lines[at * len(test) : (at + 1) * len(test)]
        assert [line["name"] for line in some] == test.names
        hits = [line["prediction"] == line["truth"] for line in some]
        assert np.mean(hits) == pytest.approx(result.row["top1"][0])
        assert all(0 < line["score"] <= 1 for line in some)
        assert {line["backbone"] for line in some} == {"msn"}


def test_the_run_directory_gets_confusions_and_predictions(tmp_path, results):
    found, test = results
    write_results(tmp_path / "lowshot.json", found, {}, test)
    assert Image.open(tmp_path / "confusion.png").size[0] > 200
    lines = list(csv.DictReader(io.StringIO((tmp_path / "confusion.csv").read_text())))
    assert sum(float(line["images"]) for line in lines) == pytest.approx(
        len(test) * len([r for r in found if r.row["backbone"] == "msn"])
    )
    assert confusion_table(found) == (tmp_path / "confusion.csv").read_text()
    assert (tmp_path / "predictions.parquet").exists() or (tmp_path / "predictions.csv").exists()
