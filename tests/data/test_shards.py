"""Shards give what their folder gives, in the same order, and say what is wrong with them."""

import io
import os
import pickle
import tarfile

import numpy as np
import pytest

from msn.data.decode import BadImageError, full_size
from msn.data.shard_writer import write_shards
from msn.data.shards import shard_source
from msn.data.sources import folder_source, list_source
from msn.errors import UserError
from tests.data.photos import make_folder, photo


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def jpeg(number):
    out = io.BytesIO()
    photo(number).save(out, "JPEG")
    return out.getvalue()


def pixels(source, i):
    return source.decode(i, full_size).pixels


def open_shards(root, use_labels=True):
    return shard_source(str(root), key="data.root", use_labels=use_labels)


def age(folder):
    for path in folder.rglob("*"):
        os.utime(path, (1e9, 1e9))


@pytest.fixture
def folder(tmp_path):
    return folder_source(str(make_folder(tmp_path / "in")), key="root", use_labels=True)


def test_shards_hold_the_folder_in_its_order(folder, tmp_path):
    paths = write_shards(folder, tmp_path / "out", images_per_shard=5)
    assert [path.name for path in paths] == [f"shard-{i:06d}.tar" for i in range(3)]
    shards = open_shards(tmp_path / "out")
    assert [shards.name(i) for i in range(12)] == [folder.name(i) for i in range(12)]
    assert shards.classes == folder.classes
    assert shards.labels.tolist() == folder.labels.tolist()
    for i in range(12):
        assert np.array_equal(pixels(shards, i), pixels(folder, i))


def test_images_are_read_at_random_after_pickling(folder, tmp_path):
    write_shards(folder, tmp_path / "out", images_per_shard=5)
    shards = open_shards(tmp_path / "out")
    pixels(shards, 0)
    copy = pickle.loads(pickle.dumps(shards))
    for i in (11, 0, 7):
        assert np.array_equal(pixels(copy, i), pixels(folder, i))


def test_the_index_is_kept_until_a_shard_changes(folder, tmp_path, index_cache, monkeypatch):
    out = tmp_path / "out"
    write_shards(folder, out, images_per_shard=5)
    age(out)
    first = open_shards(out)
    assert list(index_cache.glob("index-*.bin"))
    with monkeypatch.context() as patch:
        patch.setattr("msn.data.shards._read_shard", None)  # fails if a shard is read again
        again = open_shards(out)
    assert [again.name(i) for i in range(12)] == [first.name(i) for i in range(12)]
    assert again.labels.tolist() == first.labels.tolist()
    write_tar(out / "shard-000002.tar", {"class_0/new.jpg": jpeg(1), "class_0/new.cls": b"0"})
    changed = open_shards(out)
    assert (len(changed), changed.name(10)) == (11, "class_0/new.jpg")


def test_labels_come_from_cls_members_named_by_classes_txt(tmp_path):
    members = {}
    for i, number in enumerate((2, 0, 2)):
        members |= {
            f"{i:03d}.jpg": jpeg(i),
            f"{i:03d}.cls": b"%d\n" % number,
            f"{i:03d}.json": b"{}",
        }
    write_tar(tmp_path / "a.tar", members)
    assert open_shards(tmp_path).classes == ["0", "2"]
    (tmp_path / "classes.txt").write_text("ant\nbee\ncat\n")
    shards = open_shards(tmp_path)
    assert (shards.classes, shards.labels.tolist()) == (["ant", "cat"], [1, 0, 1])
    assert open_shards(tmp_path, use_labels=False).labels is None
    (tmp_path / "classes.txt").write_text("ant\n")
    with pytest.raises(UserError, match=r"classes.txt names 1 classes, a shard has number 2"):
        open_shards(tmp_path)


def test_without_cls_the_first_folder_is_the_class_even_in_shuffled_shards(tmp_path):
    write_tar(tmp_path / "a.tar", {f"{c}/{i}.jpg": jpeg(i) for i in range(3) for c in "ba"})
    shards = open_shards(tmp_path / "a.tar")
    assert [shards.classes[label] for label in shards.labels] == list("bababa")


def test_names_that_would_collide_in_webdataset_are_kept_apart(tmp_path):
    for name in ("a.b.jpg", "a_b.jpg", "a.jpg", "a.png"):
        (tmp_path / "in").mkdir(exist_ok=True)
        photo(len(name)).save(tmp_path / "in" / name)
    folder = folder_source(str(tmp_path / "in"), key="root", use_labels=True)
    write_shards(folder, tmp_path / "out", images_per_shard=9)
    shards = open_shards(tmp_path / "out")
    stems = [shards.name(i).partition(".")[0] for i in range(4)]
    assert len(set(stems)) == 4
    for i in range(4):
        assert np.array_equal(pixels(shards, i), pixels(folder, i))


def test_paths_of_a_list_stay_inside_the_shard(tmp_path):
    photo(0).save(tmp_path / "0.jpg")
    (tmp_path / "sub").mkdir()
    listed = tmp_path / "sub" / "list.txt"
    listed.write_text("../0.jpg\n../gone.jpg\n")
    write_shards(
        list_source(str(listed), key="root", root=None, use_labels=True),
        tmp_path / "out",
        images_per_shard=9,
    )
    shards = open_shards(tmp_path / "out")
    assert [shards.name(i) for i in range(len(shards))] == ["0.jpg"]


def test_a_truncated_shard_gives_its_whole_images_and_a_bad_one(folder, tmp_path):
    (path,) = write_shards(folder, tmp_path / "out", images_per_shard=12)
    last = open_shards(path).members
    os.truncate(path, int(last.offset[11]) + 10)
    shards = open_shards(path)
    assert np.array_equal(pixels(shards, 10), pixels(folder, 10))
    if len(shards) == 12:
        with pytest.raises(BadImageError, match=r"ends before it"):
            pixels(shards, 11)


def test_a_vanished_shard_is_a_bad_image(folder, tmp_path):
    (path,) = write_shards(folder, tmp_path / "out", images_per_shard=12)
    shards = open_shards(path)
    path.unlink()
    with pytest.raises(BadImageError, match=r"shard-000000.tar: No such file"):
        pixels(shards, 3)


def test_what_is_wrong_with_shards_is_said(folder, tmp_path):
    with pytest.raises(UserError, match=r"there is no such folder or tar file"):
        open_shards(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds no shard"):
        open_shards(folder.root)
    (tmp_path / "no").mkdir()
    (tmp_path / "no" / "x.tar").write_bytes(b"not a tar" * 100)
    with pytest.raises(UserError, match=r"x.tar: is no uncompressed tar file"):
        open_shards(tmp_path / "no")
    (tmp_path / "gz").mkdir()
    (tmp_path / "gz" / "x.tar.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"compressed shards cannot be read at random"):
        open_shards(tmp_path / "gz")
    write_shards(folder, tmp_path / "out", images_per_shard=5)
    with pytest.raises(UserError, match=r"holds shards already"):
        write_shards(folder, tmp_path / "out", images_per_shard=5)
    with pytest.raises(UserError, match=r"images_per_shard=0: must be >= 1"):
        write_shards(folder, tmp_path / "other", images_per_shard=0)
