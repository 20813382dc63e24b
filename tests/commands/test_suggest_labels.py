"""`msn suggest_labels`: a list, a table and a contact sheet; the honest comparison; mistakes."""

import csv
import errno
import os
import shlex

import pytest
import torch
from PIL import Image

from msn.commands import suggest_labels
from msn.method.vit import VisionTransformer
from msn.weights import save_backbone
from tests.commands.conftest import QUICK
from tests.weights.builders import make_trunk


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    trunk = make_trunk()
    path = tmp_path_factory.mktemp("run") / "backbone.safetensors"
    save_backbone(path, trunk.state_dict(), {"model": trunk.model_config})
    return path


def read_table(out):
    with (out / "suggested.csv").open(newline="", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def test_a_file_that_fits_several_families_asks_for_the_family(command, tmp_path, images):
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 64, "depth": 1, "num_heads": 1}
    trunk = VisionTransformer(**sizes, mlp_ratio=2.0, position="rope")
    torch.save(trunk.state_dict(), tmp_path / "bare.pth")
    arguments = [f"checkpoint={tmp_path / 'bare.pth'}", "budget=3", "choose=medoids"]
    arguments += [
        "model.num_heads=1",
        "features.image_size=16",
        "compare_seeds=0",
        "cache_dir=null",
        "device=cpu",
    ]
    where = ["data=folder", f"data.root={images}", f"out={tmp_path / 'out'}"]
    code, _, err = command("suggest_labels", *arguments, *where)
    assert (code, "init_family" in err) == (2, True)
    code, _, err = command("suggest_labels", *arguments, *where, "init_family=dinov3")
    assert code == 0, err


def test_medoids_of_any_backbone_with_the_comparison(command, tmp_path, images, export):
    Image.new("RGB", (40, 36)).save(tmp_path / "images" / "class0" / "cut.png")
    cut = tmp_path / "images" / "class0" / "cut.png"
    cut.write_bytes(cut.read_bytes()[:60])
    arguments = [f"checkpoint={export}", "budget=6", "choose=medoids", "compare_seeds=2"]
    where = ["data=folder", f"data.root={images}", f"out={tmp_path / 'out'}"]
    code, out, _ = command("suggest_labels", *arguments, *where)
    assert code == 0
    assert "random, 2 seeds" in out
    names = (tmp_path / "out" / "suggested.txt").read_text().split()
    assert len(set(names)) == 6
    assert not any("cut" in name for name in names)
    rows = read_table(tmp_path / "out")
    assert [row["path"] for row in rows] == [str(images / name) for name in names]
    assert Image.open(tmp_path / "out" / "contact_sheet.png").size[0] > 100


def test_prototypes_of_a_run_on_any_folder_with_one_look_at_the_images(
    command, tmp_path, images, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MSN_CACHE_DIR", str(tmp_path / "cache"))
    assert command("train", *QUICK, f"run.dir={tmp_path / 'run'}")[0] == 0
    arguments = [f"checkpoint={tmp_path / 'run'}", f"data.root={images}", "budget=5"]
    code, out, err = command("suggest_labels", *arguments, "compare_seeds=0")
    assert code == 0, err
    assert "random" not in out
    where = [f"data.root={images / 'class0'}", f"out={tmp_path / 'flat'}"]
    code, out, _ = command("suggest_labels", f"checkpoint={tmp_path / 'run'}", "budget=2", *where)
    why = "not compared with random choices, as there are no labels: all images lie in the folder"
    assert (code, why in out) == (0, True)
    found = sorted(path.name for path in (tmp_path / "suggested_labels").iterdir())
    assert found == ["contact_sheet.png", "suggested.csv", "suggested.txt"]
    assert len((tmp_path / "suggested_labels" / "suggested.txt").read_text().split()) == 5
    assert len(list((tmp_path / "cache" / "features").iterdir())) == 2  # one a pool


def label_and_evaluate(command, printed, out, labels, monkeypatch, away):
    """Fill in the column, then do what the command said last, from another directory."""
    rows = read_table(out)
    with (out / "suggested.csv").open("w", newline="", errors="surrogateescape") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows({**row, "label": labels(row)} for row in rows)
    said = printed.partition("then: python eval_lowshot.py ")[2].splitlines()[0]
    monkeypatch.chdir(away)
    tail = ["protocol.shots=[1]", "protocol.splits=1", "protocol.logistic.lambd_grid=null"]
    tail += ["baselines=[]", "protocol.knn_neighbours=null", "data.num_workers=0"]
    return command("eval_lowshot", *shlex.split(said), *tail, f"run.dir={away / 'run'}")


@pytest.mark.parametrize("pool", ["folder", "list", "shards"])
def test_suggest_label_evaluate(pool, command, tmp_path, images, export, monkeypatch):
    odd = os.fsdecode(os.path.join(os.fsencode(images), b"caf\xe9, two"))
    (images / "class1").rename(odd)
    monkeypatch.chdir(images.parent)
    if pool == "list":
        names = sorted(os.path.relpath(path, "images") for path in images.rglob("*.png"))
        text = "".join(f'"{name}"\n' for name in names)
        (images / "all.csv").write_text(text, errors="surrogateescape")
    elif pool == "shards":
        assert command("make_shards", "root=images", "out=shards")[0] == 0
    root = {"folder": "images", "list": "images/all.csv", "shards": "shards"}[pool]
    arguments = [f"checkpoint={export}", "budget=16", "choose=medoids", "compare_seeds=0"]
    arguments += [f"data={pool}", "data.use_labels=false", "data.num_workers=0", "out=out"]
    code, printed, err = command("suggest_labels", f"data.root={root}", *arguments)
    assert code == 0, err
    out = tmp_path / "out"
    away = tmp_path / "away"
    away.mkdir()
    code, _, err = label_and_evaluate(command, printed, out, lambda row: "", monkeypatch, away)
    assert (code, "no row has a label" in err) == (2, True)
    number = {row["path"]: i for i, row in enumerate(read_table(out))}
    code, shown, err = label_and_evaluate(
        command, printed, out, lambda row: f"kind {number[row['path']] % 2}", monkeypatch, away
    )
    assert code == 0, err
    assert "labels from 12 images, 4 held out" in " ".join(shown.split())
    assert "unreadable" not in err


def test_the_image_size_counts_and_a_failed_writing_leaves_nothing(
    command, tmp_path, images, export, monkeypatch
):
    arguments = [f"checkpoint={export}", f"data.root={images}", "budget=2", "choose=medoids"]
    arguments += [f"out={tmp_path / 'out'}", "cache_dir=null"]
    code, _, err = command("suggest_labels", *arguments, "features.image_size=30")
    assert (code, "image_size=30" in err) == (2, True)

    def full(path, names):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(suggest_labels, "write_names", full)
    code, _, err = command("suggest_labels", *arguments)
    assert (code, "No space left" in err) == (2, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["budget=2"], "has no head and prototypes"),
        (["budget=0", "choose=medoids"], "budget must be a whole number >= 1, got 0"),
        (["budget=99999", "choose=medoids"], "budget=99999: must be in [1, 1297]"),
        (["budget=2", "choose=best"], "choose=best: must be one of prototypes, medoids"),
        (["choose=medoids"], "budget must be given"),
    ],
)
def test_mistakes_leave_nothing(command, tmp_path, export, arguments, message):
    out = tmp_path / "out"
    code, _, err = command("suggest_labels", f"checkpoint={export}", f"out={out}", *arguments)
    assert code == 2
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert not out.exists()
