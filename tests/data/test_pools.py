"""Held-out images are never trained on, however the data are laid out."""

import numpy as np
import pytest
from PIL import Image

from msn.data.pools import build_pools
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
    return build_pools(**{**SETTINGS, "root": None if root is None else str(root), **settings})


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


def test_without_labels_nothing_is_held_out(tmp_path):
    root = make(tmp_path / "root")
    (tmp_path / "a.csv").write_text("root/c0/0.png,x\nroot/c1/0.png,y\n")
    for source, where, size in (("folder", root, None), ("list", tmp_path / "a.csv", None)):
        found = pools(where, source=source, use_labels=False, image_size=size)
        assert found.labelled is found.held_out is None
    assert pools(source="digits", image_size=8, use_labels=False).held_out is None
    single = pools(make(tmp_path / "single", classes=4, count=1))
    assert (len(single.train), single.labelled, single.held_out) == (4, None, None)


def test_settings_that_a_source_does_not_read_are_refused(tmp_path):
    root = make(tmp_path / "root")
    for settings, message in (
        ({"source": "cifar10", "val_root": "x"}, "cifar10 has its own test images"),
        ({"download": True}, "only cifar10, cifar100, stl10 can be fetched"),
        ({"image_size": 32}, "digits alone are upsampled"),
    ):
        with pytest.raises(UserError, match=message):
            pools(root, **settings)
