"""Held-out images are never trained on, however the data are laid out."""

import re

import numpy as np
import pytest
from PIL import Image

from msn.commands.make_shards import write_shards
from msn.data.pools import PoolSettings, build_pools
from msn.data.sources import folder_source
from msn.errors import UserError

SETTINGS = {
    "source": "folder",
    "root": None,
    "val_root": None,
    "hold_out": 0.2,
    "split_seed": 0,
    "use_labels": True,
    "download": False,
    "image_size": None,
}


def make(folder, classes=2, count=5):
    for c in range(classes):
        (folder / f"c{c}").mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (9, 9), (20 * i, 90 * c, 5)).save(folder / f"c{c}" / f"{i}.png")
    return folder


def pools(root=None, **settings):
    root = None if root is None else str(root)
    return build_pools(PoolSettings(**{**SETTINGS, "root": root, **settings}))


def places(subset):
    where = getattr(subset.source, "root", "")
    return {f"{where}/{subset.name(i)}" for i in range(len(subset))}


def assert_apart(found, train, held_out):
    assert (len(found.train), len(found.held_out)) == (train, held_out)
    assert len(places(found.train)) == train
    assert places(found.train).isdisjoint(places(found.held_out))


def test_digits_and_held_out_shares_are_apart(tmp_path):
    digits = pools(source="digits", image_size=8)
    assert_apart(digits, 1297, 500)
    found = pools(make(tmp_path / "flat"))
    assert_apart(found, 8, 2)
    assert np.bincount(found.held_out.labels).tolist() == [1, 1]


@pytest.mark.parametrize("part", ["val", "valid", "validation", "test"])
def test_parts_below_the_root_are_apart(tmp_path, part):
    make(tmp_path / "train")
    make(tmp_path / part, count=3)
    assert_apart(pools(tmp_path), 10, 6)


def test_train_alone_is_a_part_and_beside_classes_a_class(tmp_path):
    make(tmp_path / "one" / "train")
    found = pools(tmp_path / "one")
    assert_apart(found, 8, 2)
    assert found.train.source.classes == ["c0", "c1"]
    make(tmp_path / "two" / "train", classes=1)
    make(tmp_path / "two" / "bus", classes=1)
    assert pools(tmp_path / "two").train.source.classes == ["bus", "train"]


def test_a_val_root_apart_is_used_and_one_that_is_trained_on_is_refused(tmp_path):
    root, other = make(tmp_path / "root"), make(tmp_path / "other", count=2)
    assert_apart(pools(root, val_root=str(other)), 10, 4)
    for val_root, how in ((root, "is"), (root / "c0", "lies inside"), (tmp_path, "holds")):
        with pytest.raises(UserError, match=f"data.val_root=.*: {how} the training folder"):
            pools(root, val_root=str(val_root))
    for name, rows in (("a", "root/c0/0.png,x\nroot/c1/0.png,y\n"), ("b", "root/c1/0.png,y\n")):
        (tmp_path / f"{name}.csv").write_text(rows, encoding="utf-8-sig")
    with pytest.raises(UserError, match="root/c1/0.png is in data.root=.*a.csv too"):
        pools(tmp_path / "a.csv", source="list", val_root=str(tmp_path / "b.csv"))


def test_held_out_images_are_not_trained_on_by_another_name(tmp_path):
    root, out = make(tmp_path / "root" / "train").parent, make(tmp_path / "out")
    make(root / "val", count=2)
    assert_apart(pools(root), 10, 4)
    link = root / "val" / "c1" / "same.png"
    for target, alias in ((root / "train/c1/3.png", "c1/3.png"), (root / "train", "c0/0.png")):
        link.symlink_to(target)
        with pytest.raises(UserError, match=f"val: c1/same.png.* is in .*train too, as {alias}"):
            pools(root)
        link.unlink()
    for part in ("train", "val"):  # two links to one folder elsewhere
        (root / part / "c2").symlink_to(out / "c0")
    with pytest.raises(UserError, match="val: c2/0.png is in data.root=.*train too; held-out"):
        pools(root)


def test_lists_and_shards_are_compared_by_real_paths_too(tmp_path):
    make(tmp_path / "root")
    (tmp_path / "latest").symlink_to("root")
    (tmp_path / "root" / "c0" / "x.png").symlink_to("1.png")
    rows = ["root/c0/0.png,x", "root/c0/1.png,x", "root/c1/0.png,y"]
    for alias in ("latest/c0/1.png", "root/c0/x.png", f"{tmp_path}/latest/c0/x.png"):
        (tmp_path / "b.csv").write_text(f"{alias},x\nroot/c1/1.png,y\n")
        (tmp_path / "a.csv").write_text("\n".join(rows))
        with pytest.raises(UserError, match=f"{alias} is in .*a.csv too, as root/c0/1.png"):
            pools(tmp_path / "a.csv", source="list", val_root=str(tmp_path / "b.csv"))
        (tmp_path / "c.csv").write_text("\n".join([*rows, f"{alias},x"]))
        assert len(pools(tmp_path / "c.csv", source="list").train.source) == 3
    for part in ("train", "val"):
        source = folder_source(str(tmp_path / "root"), key="root", use_labels=True)
        write_shards(source, tmp_path / "shards" / part, images_per_shard=5)
    assert len(pools(tmp_path / "shards", source="shards").held_out) == 10
    again = tmp_path / "shards" / "val" / "shard-000001.tar"
    again.unlink()
    again.symlink_to("../train/shard-000000.tar")
    with pytest.raises(UserError, match="shard-000001.tar is in data.root=.* too, as .*000000.tar"):
        pools(tmp_path / "shards", source="shards")


def single(folder):
    make(folder, classes=1)


def flat(folder):
    make(folder / "x", classes=1)
    for file in (folder / "x" / "c0").iterdir():
        file.rename(folder / file.name)


def stray(folder):
    make(folder)
    (folder / "c0" / "0.png").rename(folder / "stray.png")


def flat_train(folder):
    flat(folder / "train")
    make(folder / "val")


def flat_val(folder):
    make(folder / "train")
    flat(folder / "val")


def flat_labelled(folder):
    flat(folder / "labelled")
    make(folder / "unlabelled")


WITHOUT_LABELS = {  # layouts: what is said of them
    stray: r"1 of 10 images, for instance stray.png, lie in no class folder: move them into one",
    flat: r"all images lie in the folder itself: put those of each class into a folder of its own",
    single: r"all images lie in one folder, c0/: put those of each class into a folder of its own",
    lambda folder: single(folder / "data"): r"all images lie in one folder, data/c0/: put",
    lambda folder: stray(folder / "data"): r"for instance data/stray.png, lie in no class folder",
    lambda folder: make(folder, classes=4, count=1): r"each of the 4 classes has a single image",
    flat_train: r"/train: all images lie in the folder itself: .* \(but .*/val has labels\)",
    flat_labelled: r"labelled/ beside unlabelled/ must hold two class folders or more",
    lambda folder: make(folder / "unlabelled"): r"all images lie in unlabelled/, whose folders are",
}


@pytest.mark.parametrize("layout", WITHOUT_LABELS, ids=range(len(WITHOUT_LABELS)))
def test_where_there_are_no_labels_the_reason_is_told(layout, tmp_path):
    layout(tmp_path / "in")
    found = pools(tmp_path / "in")
    assert found.labelled is found.held_out is None
    assert re.search(WITHOUT_LABELS[layout], found.why)


def test_reasons_of_a_val_root_and_of_lists(tmp_path):
    root = make(tmp_path / "root")
    flat(tmp_path / "val")
    found = pools(root, val_root=str(tmp_path / "val"))
    assert found.labelled is None
    assert re.search("/val: all images lie in the folder itself.*but .*root has labels", found.why)
    flat_val(tmp_path / "parts")  # here a share of the training images serves
    assert_apart(pools(tmp_path / "parts"), 8, 2)
    for rows, why in (
        ("path\nroot/c0/0.png\nroot/c1/0.png", "no row has a label: it stands in the column"),
        ("path,label\nroot/c0/0.png,\nroot/c1/0.png,", "no row has a label: it stands in the"),
        ("root/c0/0.png,x\nroot/c1/0.png,x", "all rows have the label x, and two are needed"),
        ("root/c0/0.png,x\nroot/c1/0.png,y", "each of the 2 classes has a single image"),
    ):
        (tmp_path / "a.csv").write_text(rows)
        assert pools(tmp_path / "a.csv", source="list").why.startswith(why)
        without = pools(tmp_path / "a.csv", source="list", use_labels=False)
        assert without.why == "data.use_labels=false"


def test_a_single_folder_around_classes_is_stepped_into_and_said(tmp_path, caplog):
    make(tmp_path / "in" / "data" / "data")
    (tmp_path / "in" / "data" / "README.txt").write_text("")
    with caplog.at_level("INFO"):
        found = pools(tmp_path / "in")
    assert_apart(found, 8, 2)
    assert found.train.source.classes == ["c0", "c1"]
    said = "all images lie in data/data/: the folders in it are the classes"
    assert any(message.endswith(said) for message in caplog.messages)


def test_a_single_folder_around_train_is_stepped_into_and_said(tmp_path, caplog):
    make(tmp_path / "in" / "data" / "train")
    make(tmp_path / "in" / "data" / "val", count=3)
    (tmp_path / "in" / "@eaDir").mkdir()
    (tmp_path / "in" / "data" / "__MACOSX").mkdir()
    with caplog.at_level("INFO"):
        assert_apart(pools(tmp_path / "in"), 10, 6)
    said = f"{tmp_path}/in holds nothing but {tmp_path}/in/data, where train/ is: takes that"
    assert said in caplog.messages
    (tmp_path / "round").mkdir()
    (tmp_path / "round" / "again").symlink_to(".")
    with pytest.raises(UserError, match="round: holds no image"):
        pools(tmp_path / "round")


def test_train_beside_test_is_a_part_also_where_systems_put_folders_beside(tmp_path):
    for part in ("train", "test", "$RECYCLE.BIN", ".ipynb_checkpoints"):
        make(tmp_path / part)
    assert_apart(pools(tmp_path), 10, 10)


@pytest.mark.parametrize("names", [("labelled", "unlabelled"), ("labeled", "unlabeled")])
def test_labelled_beside_unlabelled_trains_on_both_and_labels_one(names, tmp_path, caplog):
    make(tmp_path / "in" / names[0], classes=3)
    flat(tmp_path / "in" / names[1])
    with caplog.at_level("INFO"):
        found = pools(tmp_path / "in")
    assert_apart(found, 17, 3)
    assert len(found.labelled) == 12
    assert found.labelled.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert found.held_out.labels.tolist() == [0, 1, 2]
    assert found.train.labels is None
    assert found.train.source.classes == ["c0", "c1", "c2"]
    assert "15 in labelled/ have labels (3 classes), 5" in caplog.text.replace("eled", "elled")
    val = make(tmp_path / "val", classes=2, count=2)
    found = pools(tmp_path / "in", val_root=str(val))
    assert_apart(found, 20, 4)
    assert len(found.labelled) == 15
    (tmp_path / "in" / "test").mkdir()
    flat(tmp_path / "in" / "test" / "c0")
    with pytest.raises(UserError, match=r"holds label.* beside test/; move what trains below"):
        pools(tmp_path / "in")


def test_without_labels_nothing_is_held_out(tmp_path):
    root = make(tmp_path / "root")
    (tmp_path / "a.csv").write_text("root/c0/0.png,x\nroot/c1/0.png,y\n")
    for source, where, size in (("folder", root, None), ("list", tmp_path / "a.csv", None)):
        found = pools(where, source=source, use_labels=False, image_size=size)
        assert found.labelled is found.held_out is None
    assert pools(source="digits", image_size=8, use_labels=False).held_out is None
    found = pools(make(tmp_path / "single", classes=4, count=1))
    assert (len(found.train), found.labelled, found.held_out) == (4, None, None)


def test_settings_that_a_source_does_not_read_are_refused(tmp_path):
    root = make(tmp_path / "root")
    for settings, message in (
        ({"source": "cifar10", "val_root": "x"}, "cifar10 has its own test images"),
        ({"download": True}, "only cifar10, cifar100, stl10, dtd, .*pets can be fetched"),
        ({"image_size": 32}, "digits alone are upsampled"),
    ):
        with pytest.raises(UserError, match=message):
            pools(root, **settings)
