"""Shards give what their folder gives, in the same order, and say what is wrong with them."""

import io
import os
import pickle
import resource
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from msn.commands.make_shards import write_shards
from msn.data.shards import find_shards, shard_source
from msn.data.sources import folder_source, list_source
from msn.errors import UserError
from msn.images.decode import decode, full_size
from msn.images.kinds import BadImageError
from tests.data.logs import warnings_in
from tests.data.photos import make_folder, photo
from tests.data.test_pools import pools


def write_tar(path, members):
    """Members by name, or pairs where names are there twice."""
    with tarfile.open(path, "w") as tar:
        for name, data in members.items() if isinstance(members, dict) else members:
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
    paths, images = write_shards(folder, tmp_path / "out", images_per_shard=5)
    assert images == 12
    assert [path.name for path in paths] == [f"shard-{i:06d}.tar" for i in range(3)]
    shards = open_shards(tmp_path / "out")
    assert [shards.name(i) for i in range(12)] == [folder.name(i) for i in range(12)]
    assert shards.classes == folder.classes
    assert shards.labels.tolist() == folder.labels.tolist()
    for i in range(12):
        assert np.array_equal(pixels(shards, i), pixels(folder, i))


def test_what_systems_put_into_an_archive_is_no_image(tmp_path):
    names = ["./a/1.jpg", "b/2.jpg", "../c/3.jpg", "a/@eaDir/4.jpg", "__MACOSX/a/._1.jpg"]
    names += ["$RECYCLE.BIN/5.jpg", "b/.hidden/6.jpg", "a/._1.jpg", "__MACOSX/7.jpg"]
    write_tar(tmp_path / "x.tar", {name: jpeg(1) for name in names})
    shards = open_shards(tmp_path)
    assert [shards.name(i) for i in range(len(shards))] == ["a/1.jpg", "b/2.jpg", "c/3.jpg"]


def test_without_labels_shards_say_why(tmp_path):
    write_tar(tmp_path / "x.tar", {f"{i}.jpg": jpeg(i) for i in range(3)})
    found = pools(tmp_path, source="shards")
    assert found.labelled is None
    assert "not every image has a .cls number" in found.why


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
        patch.setattr("msn.data.shards.read_shard", None)  # fails if a shard is read again
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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ant\n\ncat\n", "line 2 is empty"),
        ("ant\n  cat\ncat\n", "lines 2 and 3 both name 'cat'"),
    ],
)
def test_names_of_classes_that_may_mean_others_are_refused(text, message, tmp_path):
    write_tar(tmp_path / "a.tar", {f"{i}.{k}": b"%d" % i for i in range(2) for k in ("jpg", "cls")})
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(UserError, match=f"classes.txt: {message}"):
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


def test_folders_of_images_without_labels_do_not_become_classes(tmp_path):
    make_folder(tmp_path / "in", classes=2, images=2)
    listed = tmp_path / "in" / "list.txt"
    listed.write_text("class_1/0.jpg\nclass_0/1.jpg\n")
    for source in (
        folder_source(str(tmp_path / "in"), key="root", use_labels=False),
        list_source(str(listed), key="root", root=None, use_labels=True),
    ):
        out = tmp_path / f"out of {len(source)}"
        write_shards(source, out, images_per_shard=9)
        shards = open_shards(out)
        assert shards.labels is None
        names = [shards.name(i) for i in range(len(shards))]
        assert names == [f"unlabelled/{source.name(i)}" for i in range(len(source))]


def test_paths_of_a_list_stay_inside_the_shard(tmp_path):
    photo(0).save(tmp_path / "0.jpg")
    (tmp_path / "sub").mkdir()
    listed = tmp_path / "sub" / "list.txt"
    listed.write_text("../0.jpg\n../gone.jpg\n")
    _, images = write_shards(
        list_source(str(listed), key="root", root=None, use_labels=True),
        tmp_path / "out",
        images_per_shard=9,
    )
    assert images == 1  # the other one is gone
    shards = open_shards(tmp_path / "out")
    assert [shards.name(i) for i in range(len(shards))] == ["0.jpg"]


def test_a_truncated_shard_gives_its_whole_images(folder, tmp_path):
    (path,), _ = write_shards(folder, tmp_path / "out", images_per_shard=12)
    before = open_shards(path)
    os.truncate(path, int(before.members.offset[11]) + 10)
    after = open_shards(path)
    assert len(after) == 11
    assert np.array_equal(pixels(after, 10), pixels(folder, 10))
    with pytest.raises(BadImageError, match=r"ends before it"):
        pixels(before, 11)  # cut off since it was indexed


def broken_header(path, members):
    """A shard of one part, in which the header of the third member is damaged."""
    with path.open("r+b") as file:
        file.seek(members[2].offset)
        file.write(bytes(9) + b"\xff" * 200)
    return members[2].offset


def second_archive(path, members):
    """Two archives, one behind the other, as `cat` makes them."""
    whole = path.read_bytes()
    path.write_bytes(whole + whole)
    return len(whole)


def cut_off(path, members):
    os.truncate(path, members[2].offset_data + 10)
    return members[2].offset


@pytest.mark.parametrize("damage", [broken_header, second_archive, cut_off])
def test_damage_is_said_at_every_start_and_what_lies_before_is_used(
    damage, tmp_path, index_cache, caplog
):
    path = tmp_path / "in" / "a.tar"
    path.parent.mkdir()
    write_tar(path, {f"{i}.jpg": jpeg(i) for i in range(4)})
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    at = damage(path, members)
    age(tmp_path / "in")
    before, why = {
        broken_header: (2, "no header"),
        second_archive: (4, "something follows"),
        cut_off: (2, "'2.jpg' claims"),
    }[damage]
    for _ in range(2):
        caplog.clear()
        assert len(open_shards(tmp_path / "in")) == before
        (line,) = warnings_in(caplog)
        assert line.startswith(f"{path}: is damaged from byte {at} ({why}")
    assert not list(index_cache.glob("index-*.bin"))


def test_a_whole_shard_is_not_called_damaged(folder, tmp_path, caplog):
    write_shards(folder, tmp_path / "out", images_per_shard=5)
    padded = tmp_path / "out" / "shard-000000.tar"
    padded.write_bytes(padded.read_bytes() + bytes(3 << 20))
    assert len(open_shards(tmp_path / "out")) == 12
    assert not warnings_in(caplog)


def test_a_sample_is_a_run_of_one_key_and_its_image_has_the_shortest_extension(tmp_path, caplog):
    members = [
        ("0001.seg.png", b"mask"),
        ("0001.jpg", jpeg(1)),
        ("0001.cls", b"1"),
        ("0001.depth.PNG", b"depth"),
        ("0002.jpg", jpeg(2)),
        ("0002.cls", b"0"),
        ("0001.jpg", jpeg(3)),  # another sample of this name
        ("0001.cls", b"2"),
        ("0001.jpg", jpeg(4)),  # and one more, right behind it
        ("0001.cls", b"0"),
    ]
    write_tar(tmp_path / "a.tar", members)
    caplog.set_level("INFO")
    shards = open_shards(tmp_path)
    assert [shards.name(i) for i in range(4)] == ["0001.jpg", "0002.jpg", "0001.jpg", "0001.jpg"]
    assert shards.labels.tolist() == [1, 0, 2, 0]
    for i in range(4):
        assert np.array_equal(pixels(shards, i), decode(jpeg(i + 1), full_size).pixels)
    (line,) = (message for message in caplog.messages if "share a sample" in message)
    assert line.startswith(f"{tmp_path}: 2 images share a sample with one of a shorter extension")


@pytest.mark.parametrize("wrong", [None, b"cat", b"-2", b"9" * 30])
@pytest.mark.parametrize(
    ("folders", "instead"), [(("a/", "b/"), "their first folders are"), (("", ""), "there are no")]
)
def test_numbers_of_some_images_alone_are_said_not_to_be_used(
    wrong, folders, instead, tmp_path, caplog
):
    members = []
    for i in range(4):
        name = f"{folders[i % 2]}{i}"
        number = b"%d" % (i // 2) if i != 3 else wrong
        members += [(f"{name}.jpg", jpeg(i))]
        members += [(f"{name}.cls", number)] if number is not None else []
    write_tar(tmp_path / "a.tar", members)
    age(tmp_path)
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        shards = open_shards(tmp_path)
        assert warnings_in(caplog) == [
            f"{tmp_path}: 1 of 4 images have no .cls number: {instead} classes"
        ]
        expected = [0, 1, 0, 1] if folders[0] else None
        assert (None if shards.labels is None else shards.labels.tolist()) == expected
    caplog.clear()
    open_shards(tmp_path, use_labels=False)
    assert not warnings_in(caplog)


def test_links_list_no_shard_twice(tmp_path):
    (tmp_path / "in" / "a").mkdir(parents=True)
    write_tar(tmp_path / "in" / "a" / "0.tar", {"0.jpg": jpeg(0)})
    write_tar(tmp_path / "in" / "1.tar", {"1.jpg": jpeg(1)})
    (tmp_path / "elsewhere").mkdir()
    write_tar(tmp_path / "elsewhere" / "2.tar", {"2.jpg": jpeg(2)})
    (tmp_path / "in" / "a" / "loop").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "again").symlink_to(tmp_path / "in" / "a")
    (tmp_path / "in" / "linked.tar").symlink_to(tmp_path / "in" / "1.tar")
    (tmp_path / "in" / "there").symlink_to(tmp_path / "elsewhere")
    found = find_shards(str(tmp_path / "in"), key="data.root")
    assert found == [f"{tmp_path}/in/{name}" for name in ("1.tar", "a/0.tar", "there/2.tar")]


def test_compressed_shards_beside_others_are_counted(tmp_path, caplog):
    write_tar(tmp_path / "a.tar", {"0.jpg": jpeg(0)})
    for name in ("b.tar.gz", "c.tgz"):
        (tmp_path / name).write_bytes(b"")
    assert len(open_shards(tmp_path)) == 1
    (line,) = warnings_in(caplog)
    assert line.startswith(f"{tmp_path}: 2 compressed shards (.tar.gz, .tgz) are skipped")


def limited_files(extra):
    """Allow about so many more open files than there are now, at least 3 in all.

    The answer gives the limit back.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = max(3, len(os.listdir("/dev/fd")) + extra)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    return lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_more_shards_than_files_may_be_open_are_all_read(tmp_path, request):
    for i in range(40):
        write_tar(tmp_path / f"{i:02d}.tar", {f"{i}.jpg": jpeg(i)})
    shards = open_shards(tmp_path)
    for extra in (30, 2):  # with the second not even what they may take is left
        give_back = limited_files(extra)
        request.addfinalizer(give_back)
        found = [pixels(shards, i) for i in (*range(40), 3)]
        give_back()
        assert np.array_equal(found[-1], found[3])
        assert len({image.tobytes() for image in found}) == 40


def test_an_image_is_not_unreadable_because_too_many_files_are_open(folder, tmp_path, request):
    write_shards(folder, tmp_path / "out", images_per_shard=5)
    shards = open_shards(tmp_path / "out")
    request.addfinalizer(limited_files(-10_000))  # also where low numbers are free
    for source in (shards, folder):
        with pytest.raises(OSError, match="Too many open files"):
            source.decode(0, full_size)


def test_a_shard_that_another_thread_closes_is_read_to_its_end(folder, tmp_path, monkeypatch):
    """With several devices as many threads read; what one opens may make another's go."""
    write_shards(folder, tmp_path / "out", images_per_shard=1)
    monkeypatch.setattr("msn.data.shards._MOST_OPEN", 1)
    shards = open_shards(tmp_path / "out")
    with ThreadPoolExecutor(4) as pool:
        order = [i % 12 for i in range(400)]
        for i, found in zip(order, pool.map(lambda i: pixels(shards, i), order), strict=True):
            assert np.array_equal(found, pixels(folder, i))


def test_a_vanished_shard_is_a_bad_image(folder, tmp_path):
    (path,), _ = write_shards(folder, tmp_path / "out", images_per_shard=12)
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
    with pytest.raises(UserError, match=r"x.tar: is not an uncompressed tar file"):
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
