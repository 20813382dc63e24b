"""`msn predict`: some labels, the class and probability of the rest, and how good that is."""

import csv

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression

import msn
from msn.errors import UserError
from msn.weights import save_backbone
from msn.weights.classifier import read_classifier
from tests.weights.builders import MODEL, make_trunk

COUNT, PER_CLASS = 45, 6
COLOURS = {"blue": (40, 60, 200), "green": (40, 190, 60), "red": (200, 50, 40)}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Images of three colours in subfolders that mean nothing, one of them damaged."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    truth = {}
    for i in range(COUNT):
        kind = list(COLOURS)[i % 3]
        (root / f"day{i % 2}").mkdir(exist_ok=True)
        pixels = np.array(COLOURS[kind]) + rng.integers(-40, 40, (32, 32, 3))
        name = f"day{i % 2}/{i:02d}.png"
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / name)
        truth[name] = kind
    (root / "day1" / "broken.png").write_bytes(b"\x89PNG no image")
    return root, truth


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run directory with nothing but its backbone."""
    place = tmp_path_factory.mktemp("run")
    save_backbone(place / "backbone.safetensors", make_trunk().state_dict(), {"model": MODEL})
    return place


@pytest.fixture(scope="module")
def some(photos):
    return dict(list(photos[1].items())[: 3 * PER_CLASS])


SMALL = {"data.num_workers": 0, "cache_dir": None, "device": "cpu"}


def test_the_rest_is_predicted_and_the_quality_is_said(photos, some, run, tmp_path, command):
    root, truth = photos
    table = tmp_path / "labels.csv"
    rows = [f"{name},{kind}" for name, kind in some.items()]
    table.write_text("\n".join(["path,label", *rows, "day1/43.png,"]))  # one is not labelled yet
    out, head = tmp_path / "out.csv", tmp_path / "head.safetensors"
    code, printed, err = command(
        *("predict", f"checkpoint={run}", f"data.root={root}", f"labels={table}", f"out={out}"),
        *(f"head={head}", "data.num_workers=0", "cache_dir=null", "device=cpu"),
    )
    assert code == 0, err
    with out.open() as file:
        lines = list(csv.DictReader(file))
    assert {line["path"] for line in lines} == set(truth) - set(some)
    assert list(lines[0]) == ["path", "prediction", "probability", "p blue", "p green", "p red"]
    for line in lines:
        shares = {kind: float(line[f"p {kind}"]) for kind in COLOURS}
        assert sum(shares.values()) == pytest.approx(1, abs=1e-4)
        assert float(line["probability"]) == pytest.approx(max(shares.values()))
        assert shares[line["prediction"]] == max(shares.values())
    right = np.mean([line["prediction"] == truth[line["path"]] for line in lines])
    assert right > 0.8
    assert "cross-validated inside them, 5 folds" in printed
    assert "blue 6, green 6, red 6" in printed
    assert "left out, cannot be read: 1 images (first: day1/broken.png)" in printed
    assert f"{len(lines)} images predicted" in printed
    assert list(read_classifier(head, MODEL["embed_dim"]).classes) == sorted(COLOURS)


def test_probabilities_are_those_of_scikit_learn(photos, some, run, tmp_path):
    root, _ = photos
    rows = msn.predict(run, root, some, **SMALL, **{"logistic.lambd": 0.5})
    features = msn.embed(run, root, feature="class_token", **{"data.num_workers": 0})
    unit = features.features - features.features.mean(dim=1, keepdim=True)
    unit = dict(zip(features.names, (unit / unit.norm(dim=1, keepdim=True)).numpy(), strict=True))
    model = LogisticRegression(C=1 / 0.5, fit_intercept=False, tol=1e-10, max_iter=10_000)
    model.fit([unit[name] for name in some], list(some.values()))
    theirs = model.predict_proba([unit[row["path"]] for row in rows])
    np.testing.assert_allclose([row["probabilities"] for row in rows], theirs, atol=2e-3)


def test_labels_may_be_anywhere_and_of_any_spelling(photos, some, run, tmp_path):
    root, _ = photos
    plain = msn.predict(run, root, some, **SMALL)
    absolute = msn.predict(run, root, {str(root / k): v for k, v in some.items()}, **SMALL)
    bare = msn.predict(run, root, {k.split("/")[1]: v for k, v in some.items()}, **SMALL)
    assert plain == absolute == bare
    beside = tmp_path / "list.csv"  # the data are a list, of which some rows have labels
    names = [f"{root / name},{some.get(name, '')},{i % 7}" for i, name in enumerate(photos[1])]
    beside.write_text("\n".join(["path,label,film", *names]))
    listed = msn.predict(run, beside, **SMALL, **{"data.group": "film"})
    assert {row["path"] for row in listed} == {str(root / row["path"]) for row in plain}


def test_a_classifier_that_is_no_better_than_one_class_blames_no_label(
    photos, run, tmp_path, capsys
):
    root, truth = photos
    kinds = list(COLOURS)
    said = {}
    # Labels that have nothing to do with the images, and the right ones but for one.
    rng = np.random.default_rng(1)
    wrong = {name: kinds[int(rng.integers(3))] for name in truth}
    nearly = {**truth, "day0/00.png": next(kind for kind in kinds if kind != truth["day0/00.png"])}
    for labels, key in ((wrong, "wrong"), (nearly, "nearly")):
        msn.predict(run, root, labels, out=tmp_path / f"{key}.csv", **SMALL)
        said[key] = capsys.readouterr().out
    assert "no better than the largest class alone" in said["wrong"]
    assert "look again" not in said["wrong"]
    assert "look again: day0/00.png" in said["nearly"]
    assert "no better" not in said["nearly"]


def test_one_label_of_each_class_is_enough(photos, run, tmp_path, capsys):
    one = {name: kind for name, kind in list(photos[1].items())[:3]}
    rows = msn.predict(run, photos[0], one, **SMALL)
    assert len(rows) == COUNT - 3
    assert "cannot be said" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("labels", "keys", "message"),
    [
        ({"day0/00.png": "a", "no.png": "b"}, {}, "1 of 2 listed images are not in the data: no"),
        ({"day0/00.png": "a", "day0/02.png": "a"}, {}, "all rows have the label a"),
        ({"day0/00.png": "a", "day1/broken.png": "b"}, {}, "two classes are needed"),
        (None, {"data.use": 1}, "unknown key"),
        ({}, {}, "lists no image"),
    ],
)
def test_mistakes_are_one_line(photos, run, labels, keys, message):
    with pytest.raises(UserError, match=message):
        msn.predict(run, photos[0], labels, **SMALL, **keys)


def test_nothing_is_overwritten_by_mistake(photos, some, run, tmp_path):
    out = tmp_path / "out.csv"
    out.write_text("mine")
    with pytest.raises(UserError, match="overwrite=true"):
        msn.predict(run, photos[0], some, out=out, **SMALL)
    with pytest.raises(UserError, match=r"must end in \.csv"):
        msn.predict(run, photos[0], some, out=tmp_path / "out.parquet", **SMALL)
    assert out.read_text() == "mine"
    msn.predict(run, photos[0], some, out=out, overwrite=True, **SMALL)
    assert out.read_text().startswith("path,prediction")
