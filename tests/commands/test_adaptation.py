"""`experiment=adapt`: what it takes from the file, how the trunk follows, and what is kept."""

import csv
import json
from types import SimpleNamespace

import pytest
import torch
import yaml

from msn.commands.adaptation import better_of, choose_prototypes, follow_init
from msn.commands.entry import compose
from msn.errors import UserError
from msn.evaluation.features import Extracted
from msn.weights import read_weights
from tests.commands.conftest import QUICK
from tests.weights.zoo import save_hugging_face

SMALL = [
    *[key for key in QUICK if not key.startswith(("model.", "trainer.max_epochs", "method.num"))],
    *("experiment=adapt", "data=digits", "trainer.max_epochs=4", "baselines=[]"),
    *("method.head.hidden_dim=32", "callbacks.checkpoint.every_n_epochs=1"),
    "callbacks.checkpoint.keep_last=9",
]


def trunk_of(path):
    return read_weights(path).trunk


@pytest.mark.parametrize("family", ["dinov2_with_registers", "dinov3_vit"])
def test_a_foundation_is_adapted_and_stands_beside_the_result(command, tmp_path, family):
    save_hugging_face(tmp_path / "found", family)
    run = tmp_path / "run"
    init = f"init={tmp_path / 'found'}"
    code, out, err = command("train", *SMALL, init, f"run.dir={run}")
    assert code == 0, err
    before = trunk_of(tmp_path / "found")
    states = {int(p.name.split("-")[1]): trunk_of(p) for p in (run / "checkpoints").iterdir()}
    same = {e: all(torch.equal(s[n], before[n]) for n in before) for e, s in states.items()}
    assert same == {1: True, 2: False, 3: False, 4: False}  # one epoch frozen
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"] == read_weights(run / "checkpoints" / "epoch-4-step-8.ckpt").model
    assert (config["model"]["patch_size"], config["method"]["num_prototypes"]) == (8, 32)
    assert "32 prototypes for 1,297 images" in out
    assert "model of" in out
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    probed = [int(row["step"]) for row in rows if row["probe/knn_top1"]]
    assert probed == [0, 2, 4, 6, 8]
    assert f"10-NN {float(rows[0]['probe/knn_top1']):.1%}" in out
    assert rows[1]["schedule/trunk_lr"] == "0.0"
    assert 0 < float(rows[-1]["schedule/trunk_lr"]) < float(rows[-1]["schedule/lr"])
    table = json.loads((run / "lowshot.json").read_text())["rows"]
    table = [row for row in table if row["classifier"] == "logistic"]
    assert [row["backbone"] for row in table] == ["foundation", "adapted"]
    assert {row["feature"] for row in table} == {"class_token_norm"}  # the foundation's own
    kept = json.loads((run / "run.json").read_text())["kept"]
    assert f"kept: {kept}\n" in out
    name, exported = kept.split()[0], trunk_of(run)
    wanted = {"foundation": before, "adapted": states[4]}[name]
    assert all(torch.equal(exported[key], wanted[key]) for key in wanted)
    again = ["protocol.shots=[1]", "protocol.splits=2", "protocol.logistic.lambd_grid=null"]
    again += ["protocol.knn_neighbours=null", "protocol.spreading=null", "baselines=[]"]
    again += ["cache_dir=null"]
    where = f"run.dir={tmp_path / 'again'}"
    code, _, err = command("eval_lowshot", f"checkpoint={run}", *again, where, "device=cpu")
    assert code == 0, err
    (row,) = json.loads((tmp_path / "again" / "lowshot.json").read_text())["rows"]
    assert row["top1"] in [other["top1"] for other in table]


def subject(name, rows):
    found = Extracted(rows, torch.zeros(len(rows), dtype=torch.bool))
    return SimpleNamespace(name=name, features=lambda *_: found)


class Labelled:
    labels = torch.arange(40) % 2
    classes = ("a", "b")
    names = tuple(map(str, range(40)))
    groups = None

    def __len__(self):
        return 40


@pytest.mark.parametrize(("foundation", "adapted"), [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
def test_the_foundation_stays_unless_the_other_is_better(foundation, adapted):
    """A feature that tells the classes with this strength."""
    noise = torch.randn(40, 8, generator=torch.Generator().manual_seed(0)) / 10
    signs = 2.0 * Labelled.labels[:, None] - 1
    subjects = [
        subject("foundation", noise + foundation * signs),
        subject("adapted", noise + adapted * signs),
    ]
    kept, why = better_of(subjects, Labelled(), None, None)
    assert kept.name == ("adapted" if adapted > foundation else "foundation")
    assert why.startswith(f"{kept.name} (10-NN on 40 labelled training images")
    kept, why = better_of(subjects, None, None, None)
    assert (kept.name, "no labels" in why) == ("adapted", True)


@pytest.mark.parametrize(
    ("before_alone", "after_alone", "name", "margin"),
    [(0, 4, "foundation", 10.0), (0, 5, "adapted", 11.2), (2, 8, "foundation", 15.8)]
    + [(2, 9, "adapted", 16.6)],
)
def test_better_means_by_more_than_chance(monkeypatch, before_alone, after_alone, name, margin):
    """Images of 40 that one of them alone gets right; two standard errors of their difference."""
    before = torch.arange(40) < before_alone
    after = (torch.arange(40) >= 30) & (torch.arange(40) < 30 + after_alone)
    hits = iter([before, after])
    monkeypatch.setattr("msn.commands.adaptation.leave_one_out", lambda *_, **__: next(hits))
    subjects = [subject(name, torch.zeros(40, 8)) for name in ("foundation", "adapted")]
    kept, why = better_of(subjects, Labelled(), None, None)
    assert kept.name == name
    assert f"foundation {before_alone / 40:.1%}, adapted {after_alone / 40:.1%}" in why
    assert f"margin for chance {margin} points" in why


@pytest.mark.parametrize(
    ("images", "number"),
    [(3, 16), (1297, 32), (5000, 128), (10_000, 256), (1_281_167, 1024)],
)
def test_prototypes_follow_from_the_images(images, number):
    config = compose("train", ["experiment=adapt"])
    (line,) = choose_prototypes(config, images)
    assert config.method.num_prototypes == number
    assert line.startswith(f"{number} prototypes for {images:,} images")
    assert choose_prototypes(config, images) == []


def test_what_is_given_stands_in_the_place_of_the_file_s(tmp_path):
    save_hugging_face(tmp_path / "found", "dinov3_vit")
    given = ["model.img_size=16", "model.rope_rescale=2", f"init={tmp_path / 'found'}"]
    config = compose("train", ["experiment=adapt", *given])
    (line,) = follow_init(config)
    assert "img_size 16, the file's 32, patch_size 8" in line
    assert (config.model.rope_rescale, config.model.position) == (2, "rope")
    assert config.data.views.patch_size == 8
    assert follow_init(config) == []


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["experiment=adapt"], "init=PATH must be given: method.freeze_epochs=1 is for a trunk"),
        (["method.layer_decay=0.5"], "init=PATH must be given: method.layer_decay=0.5 is"),
        (["keep_better=true"], "init=PATH must be given: keep_better=true is"),
        (["model=of_init"], "model.img_size is null: init=PATH gives the file's, or give a number"),
    ],
)
def test_keys_of_an_adaptation_need_a_file(command, tmp_path, arguments, line):
    with pytest.raises(UserError, match=line):
        follow_init(compose("train", arguments))
