"""`msn make_shards`: training on its shards is training on the folder they were made from."""

import shutil

import numpy as np
import pytest

from msn.data.decode import full_size
from msn.data.pools import build_pools
from tests.data.photos import make_folder
from tests.data.test_pools import SETTINGS

LAYOUTS = {  # folders below the root: the part that each is written to
    "a root without parts": {"": ""},
    "train and val": {"train": "train", "val": "val", "extra": None},
    "train and valid": {"train": "train", "valid": "valid", "test": None},
    "train and validation": {"train": "train", "validation": "validation"},
    "train and test": {"train": "train", "test": "test"},
    "train alone": {"train": "train"},
}


@pytest.fixture(autouse=True)
def index_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MSN_CACHE_DIR", str(tmp_path / "cache"))


def pools(source, root):
    return build_pools(**{**SETTINGS, "source": source, "root": str(root)})


def pixels(subset, i):
    return subset.source.decode(int(subset.positions[i]), full_size).pixels


def assert_same(ours, theirs):
    """The same images in the same order, with the same labels."""
    assert len(ours) == len(theirs)
    assert ours.labels.tolist() == theirs.labels.tolist()
    assert ours.source.classes == theirs.source.classes
    for i in range(len(ours)):
        assert ours.name(i) == theirs.name(i)
        assert np.array_equal(pixels(ours, i), pixels(theirs, i))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shards_train_and_hold_out_what_their_folder_does(layout, command, tmp_path):
    root, out = tmp_path / "in", tmp_path / "out"
    for number, part in enumerate(LAYOUTS[layout]):
        make_folder(root / part, classes=3, images=5 - number)
    if layout == "train and test":
        shutil.rmtree(root / "test" / "class_0")  # classes keep their numbers
    code, printed, _ = command("make_shards", f"root={root}", f"out={out}", "images_per_shard=4")
    assert code == 0
    written = {part for part in LAYOUTS[layout].values() if part is not None}
    assert {str(path.parent.relative_to(out)) for path in out.rglob("*.tar")} == {
        part or "." for part in written
    }
    assert printed.count(" images, ") == len(written)
    assert printed.splitlines()[-1].endswith(f"data=shards data.root={out}")
    for ours, theirs in zip(pools("shards", out)[:3], pools("folder", root)[:3], strict=True):
        assert_same(ours, theirs)


def test_a_list_becomes_shards_and_what_is_left_out_is_not_counted(command, tmp_path, caplog):
    make_folder(tmp_path / "in", classes=2, images=2)
    listed = tmp_path / "a.csv"
    rows = [f"in/class_{c}/{i}.jpg,{name}" for c, name in enumerate("xy") for i in range(3)]
    listed.write_text("\n".join(rows))  # the third one of each is not there
    code, printed, _ = command("make_shards", f"root={listed}", f"out={tmp_path / 'out'}")
    assert code == 0
    assert "left out: in/class_0/2.jpg (No such file or directory)" in caplog.messages
    assert printed.startswith("4 images (2 left out), 2 classes, in 1 shards: ")


def test_why_there_are_no_labels_is_said_and_half_of_them_are_refused(command, tmp_path):
    make_folder(tmp_path / "in", classes=2, images=2)
    (tmp_path / "in" / "class_0" / "0.jpg").rename(tmp_path / "in" / "stray.jpg")
    code, printed, _ = command("make_shards", f"root={tmp_path / 'in'}", f"out={tmp_path / 'out'}")
    why = "4 images, no labels (1 of 4 images, for instance stray.jpg, lie in no class folder"
    assert (code, printed.startswith(why)) == (0, True)
    for part in ("labelled", "unlabelled"):
        make_folder(tmp_path / "half" / part, classes=2, images=2)
    code, _, err = command("make_shards", f"root={tmp_path / 'half'}", f"out={tmp_path / 'no'}")
    assert (code, "some images have labels; use_labels=false packs" in err) == (2, True)
    assert not (tmp_path / "no").exists()


def test_images_that_links_hold_out_and_train_on_are_not_packed(command, tmp_path):
    make_folder(tmp_path / "in" / "train", classes=2, images=2)
    (tmp_path / "in" / "val").mkdir()
    (tmp_path / "in" / "val" / "class_0").symlink_to("../train/class_0")
    code, _, err = command("make_shards", f"root={tmp_path / 'in'}", f"out={tmp_path / 'out'}")
    assert (code, "class_0/0.jpg is in data.root=" in err) == (2, True)
    assert not (tmp_path / "out").exists()


def test_mistakes_are_said_before_anything_is_written(command, tmp_path):
    make_folder(tmp_path / "in" / "train")
    (tmp_path / "in" / "val").mkdir()
    (tmp_path / "full" / "old").mkdir(parents=True)
    for root, out, more, message in (
        ("in", "out", [], "val: is an empty folder"),
        ("in/train", "out", ["images_per_shard=1.5"], "images_per_shard=1.5: must be a whole"),
        ("in/train", "out", ["images_per_shard=0"], "images_per_shard=0: must be >= 1"),
        ("nowhere", "out", [], "nowhere: there is no such folder"),
        ("in/train", "full", [], "full: is not empty; choose a new folder"),
    ):
        where = [f"root={tmp_path / root}", f"out={tmp_path / out}"]
        code, _, err = command("make_shards", *where, *more)
        assert code == 2
        (line,) = err.splitlines()
        assert line.startswith("error: ")
        assert message in line
    assert not (tmp_path / "out").exists()
