"""`msn make_shards`: training on its shards is training on the folder they were made from."""

import os
import shlex
import shutil

import numpy as np
import pytest

from msn.commands import make_shards
from msn.commands.make_shards import write_shards
from msn.data.pools import PoolSettings, build_pools
from msn.data.shards import shard_source
from msn.data.sources import list_source
from msn.files import write_file
from msn.images.decode import full_size
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
    return build_pools(PoolSettings(**{**SETTINGS, "source": source, "root": str(root)}))


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
    root, out = tmp_path / "in", tmp_path / "out (1), [2]"
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
    assert shlex.split(printed.splitlines()[-1])[-2:] == ["data=shards", f"data.root={out}"]
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


def test_why_there_are_no_labels_is_said(command, tmp_path):
    make_folder(tmp_path / "in", classes=2, images=2)
    (tmp_path / "in" / "class_0" / "0.jpg").rename(tmp_path / "in" / "stray.jpg")
    code, printed, _ = command("make_shards", f"root={tmp_path / 'in'}", f"out={tmp_path / 'out'}")
    why = "4 images, no labels (1 of 4 images, for instance stray.jpg, lie in no class folder"
    assert (code, printed.startswith(why)) == (0, True)


def test_images_that_links_hold_out_and_train_on_are_not_packed(command, tmp_path):
    make_folder(tmp_path / "in" / "train", classes=2, images=2)
    (tmp_path / "in" / "val").mkdir()
    (tmp_path / "in" / "val" / "class_0").symlink_to("../train/class_0")
    code, _, err = command("make_shards", f"root={tmp_path / 'in'}", f"out={tmp_path / 'out'}")
    assert (code, "class_0/0.jpg is in data.root=" in err) == (2, True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
@pytest.mark.parametrize("stands", [False, True])
def test_a_command_that_was_interrupted_can_be_repeated(
    error, stands, command, tmp_path, monkeypatch
):
    for part in ("train", "val"):
        make_folder(tmp_path / "in" / part, classes=2, images=2)
    if stands:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / ".hidden").touch()
    arguments = [f"root={tmp_path / 'in'}", f"out={tmp_path / 'out'}", "images_per_shard=1"]
    written = []

    def write(file, *rest):
        written.append(file)
        if len(written) == 6:  # one of val's, when all of train's stand
            raise error
        return write_file(file, *rest)

    monkeypatch.setattr(make_shards, "write_file", write)
    code, _, err = command("make_shards", *arguments)
    assert code == (130 if isinstance(error, KeyboardInterrupt) else 2)
    assert len(err.splitlines()) == 1
    assert (tmp_path / "out").exists() == stands
    assert [path.name for path in tmp_path.glob("out/*")] == [".hidden"] * stands
    assert command("make_shards", *arguments)[0] == 0
    assert len(list((tmp_path / "out").rglob("*.tar"))) == 8


def test_mistakes_are_said_before_anything_is_written(command, tmp_path):
    make_folder(tmp_path / "in" / "train")
    (tmp_path / "in" / "val").mkdir()
    (tmp_path / "full" / "old").mkdir(parents=True)
    for root, out, more, message in (
        ("in", "out", [], "val: is an empty folder"),
        ("in/train", "out", ["images_per_shard=1.5"], "images_per_shard must be a whole number"),
        ("in/train", "out", ["images_per_shard=0"], "images_per_shard must be a whole number >= 1"),
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


AWKWARD = [
    " ",
    " cat",
    "cat",
    "cat ",
    "a\nb",
    "c\rd",
    '"cat"',
    "\ufeffd",
    "\u2028",
    "\udcff",
    "e\\n",
]


def test_folders_of_any_name_are_classes_of_their_own(command, tmp_path):
    for number, name in enumerate(AWKWARD):
        make_folder(tmp_path / "a", classes=1, images=2)
        (tmp_path / "a" / "class_0").rename(tmp_path / "a" / name)
        (tmp_path / "a" / name / "0.jpg").rename(tmp_path / "a" / name / f"{number}\n \x1b.jpg")
    code, _, _ = command("make_shards", f"root={tmp_path / 'a'}", f"out={tmp_path / 'out'}")
    assert code == 0
    ours, theirs = pools("shards", tmp_path / "out"), pools("folder", tmp_path / "a")
    assert sorted(ours.train.source.classes) == sorted(AWKWARD)
    for part, folder in zip(ours[:3], theirs[:3], strict=True):
        assert part.labels.tolist() == folder.labels.tolist()
        assert part.source.classes == folder.source.classes
        assert part.name(0) == folder.name(0)


def test_an_image_without_an_ending_gets_one_that_readers_know(command, tmp_path, caplog):
    make_folder(tmp_path, classes=1, images=2)
    (tmp_path / "class_0" / "0.jpg").rename(tmp_path / "class_0" / "0")
    (tmp_path / "class_0" / "text").write_text("no image")
    os.mkfifo(tmp_path / "class_0" / "pipe.jpg")
    listed = tmp_path / "a.txt"
    make_folder(tmp_path / ".hidden", classes=1, images=1)
    listed.write_text(
        ".hidden/class_0/0.jpg\nclass_0/0\nclass_0/1.jpg\nclass_0/pipe.jpg\nclass_0/text\n"
    )
    source = list_source(str(listed), key="root", root=None, use_labels=True)
    _, images = write_shards(source, tmp_path / "out", images_per_shard=9)
    shards = shard_source(str(tmp_path / "out"), key="data.root", use_labels=True)
    assert images == len(shards) == 3
    names = [shards.name(i) for i in range(3)]
    assert names[0] == "unlabelled/_.hidden/class_0/0.jpg"
    assert names[1:] == ["unlabelled/class_0/0.jpeg", "unlabelled/class_0/1.jpg"]
    assert [line for line in caplog.messages if line.startswith("left out")] == [
        "left out: class_0/pipe.jpg (not a regular file)",
        "left out: class_0/text (no image, by its name and its bytes)",
    ]


def test_images_without_labels_beside_labelled_ones_get_none_in_shards(command, tmp_path):
    make_folder(tmp_path / "in" / "labelled", classes=2, images=3)
    make_folder(tmp_path / "in" / "unlabelled", classes=1, images=2)
    code, _, err = command("make_shards", f"root={tmp_path / 'in'}", f"out={tmp_path / 'out'}")
    assert code == 0, err
    ours, theirs = pools("shards", tmp_path / "out"), pools("folder", tmp_path / "in")
    assert ours.train.source.classes == theirs.train.source.classes == ["class_0", "class_1"]
    for part, folder in zip(ours[1:3], theirs[1:3], strict=True):
        assert part.labels.tolist() == folder.labels.tolist()
    for i in range(len(theirs.train)):
        assert ours.train.name(i) == theirs.train.name(i)
