"""The index of a folder is kept, used again, and never out of date."""

import errno
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from msn.data import index, tables
from msn.data.index import scan_folder, system_name
from msn.data.layout import labels_from_folders
from msn.data.sources import folder_source
from msn.data.tables import StringTable
from msn.errors import UserError
from tests.data.logs import warnings_in
from tests.data.photos import photo


def scan(root):
    return list(scan_folder(str(root), cache_from=1).paths)


def fill(root):
    for name in ("a/1.jpg", "a/2.jpg", "b/c/3.png", "4.webp"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        photo(0).save(root / name)
    age(root)
    return root


def age(root):
    """As if nothing had changed for a while: a folder changed just now is not trusted."""
    for path in (root, *root.rglob("*")):
        if path.is_dir():
            os.utime(path, (1e9, 1e9))


def test_images_of_kinds_that_are_not_read_are_counted(tmp_path, caplog):
    root = fill(tmp_path / "in")
    for name in ("a/x.jxl", "b/y.JXL", "b/c/z.psd", "b/notes.txt", ".w.jxl"):
        (root / name).write_bytes(b"")
    age(root)
    said = f"{root}: skipped images of kinds that are not read: 2 .jxl, 1 .psd"
    for _ in range(2):  # the second time it is in the cache
        scan(root)
    assert warnings_in(caplog) == [said, said]


def rename(root):
    (root / "a/1.jpg").rename(root / "a/9.jpg")


CHANGES = {
    "a file is added": lambda root: photo(1).save(root / "b/c/new.jpg"),
    "a file is gone": lambda root: (root / "4.webp").unlink(),
    "a file has another name": rename,
    "a folder is added": lambda root: (root / "d").mkdir() or photo(1).save(root / "d/5.jpg"),
    "a folder has moved": lambda root: (root / "b/c").rename(root / "a/c"),
}


def test_an_unchanged_folder_is_not_walked_again(tmp_path, monkeypatch):
    root = fill(tmp_path / "in")
    first = scan(root)
    monkeypatch.setattr(index, "_walk", None)
    assert scan(root) == first == ["4.webp", "a/1.jpg", "a/2.jpg", "b/c/3.png"]


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_seen(tmp_path, change):
    root = fill(tmp_path / "in")
    before = scan(root)
    CHANGES[change](root)
    after = scan(root)
    assert after != before
    assert after == sorted(
        str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()
    )


def test_a_folder_that_changed_just_now_is_not_trusted(tmp_path, index_cache):
    root = fill(tmp_path / "in")
    os.utime(root / "a")
    scan(root)
    assert not list(index_cache.glob("index-*.bin"))


def close(monkeypatch, *folders, error=PermissionError):
    """As if these could not be listed: whoever runs the tests may be allowed everything."""
    whole = os.scandir

    def scandir(path):
        if os.path.normpath(path) in map(str, folders):
            number = errno.EACCES if error is PermissionError else errno.ENOENT
            raise error(number, os.strerror(number), str(path))
        return whole(path)

    monkeypatch.setattr(os, "scandir", scandir)


@pytest.mark.parametrize("error", [PermissionError, FileNotFoundError])
def test_a_folder_that_cannot_be_listed_is_passed_over_and_said(
    error, tmp_path, index_cache, monkeypatch, caplog
):
    root = fill(tmp_path / "in")
    with monkeypatch.context() as patch:
        close(patch, root / "a", error=error)
        assert scan(root) == ["4.webp", "b/c/3.png"]
    why = "Permission denied" if error is PermissionError else "No such file or directory"
    assert warnings_in(caplog) == [f"{root}: skipped what cannot be listed: a ({why})"]
    assert not list(index_cache.glob("index-*.bin"))
    assert len(scan(root)) == 4


def test_many_folders_that_cannot_be_listed_are_counted(tmp_path, monkeypatch, caplog):
    root = fill(tmp_path / "in")
    close(monkeypatch, root / "a", root / "b/c")
    assert scan(root) == ["4.webp"]
    (line,) = warnings_in(caplog)
    assert line.endswith("cannot be listed: a (Permission denied) and 1 more")


def test_a_root_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    root = fill(tmp_path / "in")
    close(monkeypatch, root)
    with pytest.raises(UserError, match=r"data.root=.*in: cannot be read \(Permission denied\)"):
        folder_source(str(root), key="data.root", use_labels=True)


def test_a_link_to_itself_ends_no_scan(tmp_path, caplog):
    root = fill(tmp_path / "in")
    (root / "itself").symlink_to("itself")
    (root / "itself.jpg").symlink_to("itself.jpg")
    assert scan(root) == ["4.webp", "a/1.jpg", "a/2.jpg", "b/c/3.png", "itself.jpg"]
    (line,) = warnings_in(caplog)  # the image is one that cannot be read, and is said as such
    assert ": itself (Too many levels" in line
    assert line.endswith(")")  # and no more


SYSTEM = ("@eaDir", "__MACOSX", "$RECYCLE.BIN", "System Volume Information", "Thumbs", "#recycle")


def test_files_and_folders_of_systems_are_no_images_and_counted(tmp_path, caplog):
    root = fill(tmp_path / "in")
    names = [f"{folder}/x.jpg" for folder in (*SYSTEM, ".ipynb_checkpoints", "a/@eaDir", ".git")]
    for name in (*names, "a/._1.jpg", "b/._2.jpg", "a/Thumbs.db", "a/desktop.ini", ".DS_Store"):
        (root / name).parent.mkdir(exist_ok=True)
        photo(1).save(root / name, "JPEG")
    age(root)
    for _ in range(2):  # the second time it is in the cache
        caplog.clear()
        with caplog.at_level("INFO"):
            assert scan(root) == ["4.webp", "a/1.jpg", "a/2.jpg", "b/c/3.png"]
        (line,) = [m for m in caplog.messages if "system" in m]
        assert line == (
            f"{root}: skipped system and hidden files and folders: 1 #recycle, 1 $RECYCLE.BIN, "
            "2 ._*, 1 .ipynb_checkpoints, 2 @eaDir, 1 System Volume Information, 1 Thumbs, "
            "1 Thumbs.db, 1 __MACOSX, 1 desktop.ini, 1 hidden"
        )


@pytest.mark.parametrize(
    "name",
    [
        *("__pycache__", "Network Trash Folder", "Temporary Items", "FOUND.000", "Found.012"),
        *("Config.Msi", "~snapshot", "$RECYCLE.BIN", "$Recycle.Bin", "$recycle.bin", "THUMBS"),
        *("Thumbs.db", "THUMBS.DB", "@EADIR", "__macosx", "Lost+Found", "DESKTOP.INI"),
    ],
)
def test_names_of_systems_are_known_in_any_case(name):
    assert system_name(name) == name


@pytest.mark.parametrize("name", ["found", "found.0000", "lost", "cache", "snapshot", "recycle"])
def test_names_that_are_nearly_those_of_systems_are_classes(name):
    assert system_name(name) is None


LINKS = {  # links by their names: where they lead, and the names that count
    "to a folder before it": ({"A": "b"}, []),
    "to a folder behind it": ({"latest": "a"}, []),
    "to an inner folder": ({"0": "b/c"}, []),
    "to a file": ({"a/0.jpg": "2.jpg", "b/3.jpg": "../4.webp"}, []),
    "one after another": ({"a/0.jpg": "8.jpg", "a/8.jpg": "../9.jpg", "9.jpg": "a/1.jpg"}, []),
    "up and round": ({"b/up": "..", "b/c/loop": "../..", "b/c/a": "../../a"}, []),
    "two to one folder outside": ({"y": "../out", "x": "../out"}, ["x/5.jpg", "x/in/6.jpg"]),
    "into another's folder": ({"x": "../out/in", "y": "../out"}, ["y/5.jpg", "y/in/6.jpg"]),
    "two to one file outside": (
        {"a/y.jpg": "../../out/5.jpg", "x.jpg": "../out/5.jpg"},
        ["a/y.jpg"],
    ),
    "to a folder and a file in it": (
        {"a/y.jpg": "../../out/5.jpg", "z": "../out"},
        ["z/5.jpg", "z/in/6.jpg"],
    ),
    "to a folder that leads back": ({"z": "../back"}, ["z/7.jpg"]),
    "to a hidden folder": ({"z": ".w", "zz": ".w"}, ["z/0.jpg"]),
}


@pytest.mark.parametrize("links", LINKS)
def test_two_names_of_one_file_count_once_and_are_said(links, tmp_path, caplog):
    root = fill(tmp_path / "in")
    for name in ("out/5.jpg", "out/in/6.jpg", "back/7.jpg", "in/.w/0.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        photo(1).save(tmp_path / name)
    (tmp_path / "back" / "to").symlink_to(root / "a")
    made, counted = LINKS[links]
    for name, target in made.items():
        (root / name).symlink_to(target)
    age(root)
    expected = sorted(["4.webp", "a/1.jpg", "a/2.jpg", "b/c/3.png", *counted])
    for _ in range(2):
        caplog.clear()
        assert scan(root) == expected
        (line,) = warnings_in(caplog)
        assert re.search("skipped .* by links to what is there under another: ", line)
    assert scan_folder(str(root)).linked == bool(counted)


def test_pipes_and_sockets_are_no_images_and_a_broken_link_is_a_missing_one(tmp_path, caplog):
    root = fill(tmp_path / "in")
    os.mkfifo(root / "pipe.jpg")
    (root / "a" / "zero.jpg").symlink_to("/dev/zero")
    (root / "a" / "gone.jpg").symlink_to("nowhere")
    assert scan(root) == ["4.webp", "a/1.jpg", "a/2.jpg", "a/gone.jpg", "b/c/3.png"]
    (line,) = warnings_in(caplog)
    assert line == f"{root}: skipped what is not a regular file: a/zero.jpg and 1 more"


def test_no_file_is_looked_at_where_there_is_no_link(tmp_path, monkeypatch):
    root = fill(tmp_path / "in")
    looked: list[str] = []
    whole = os.stat
    monkeypatch.setattr(os, "stat", lambda path, **how: looked.append(path) or whole(path, **how))
    monkeypatch.setattr(os, "readlink", lambda path: looked.append(path))
    tree = index._walk(os.path.realpath(root))
    assert len(tree.paths) == 4
    assert sorted(looked) == sorted(map(str, (root, root / "a", root / "b", root / "b/c")))


@pytest.mark.parametrize("damage", [b"", b"words", bytes(200)])
def test_a_damaged_index_is_made_anew(tmp_path, index_cache, damage):
    root = fill(tmp_path / "in")
    first = scan(root)
    (file,) = index_cache.glob("index-*.bin")
    file.write_bytes(damage)
    assert scan(root) == first


def test_a_cut_off_index_is_made_anew(tmp_path, index_cache):
    root = fill(tmp_path / "in")
    first = scan(root)
    (file,) = index_cache.glob("index-*.bin")
    file.write_bytes(file.read_bytes()[:-70])
    assert scan(root) == first


def test_an_index_of_other_kinds_of_images_is_made_anew(tmp_path, monkeypatch):
    root = fill(tmp_path / "in")
    (root / "a" / "x.heic").write_bytes(b"")
    age(root)
    without = (".jpg", ".png", ".webp")
    for kinds, count in ((without, 4), ((*without, ".heic"), 5), (without, 4)):
        for module in (index, tables):  # as where its decoder is installed, or is not
            monkeypatch.setattr(module, "SUFFIXES", kinds)
        assert len(scan(root)) == count


def test_strings_of_any_bytes_survive():
    strings = ["", "plain", "caf\u00e9", os.fsdecode(b"\xff\xfe"), "two\nlines"]
    assert list(StringTable.from_strings(strings)) == strings


# Not ru_maxrss: a process starts with the peak of the one that started it.
MILLION = """
import sys, time
from pathlib import Path
import msn.data.sources as sources
def kilobytes(name):
    return int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0])
before = kilobytes("VmRSS")
start = time.perf_counter()
found = sources.folder_source(sys.argv[1], key="root", use_labels=True)
print(len(found), time.perf_counter() - start, found.name(987_654), len(found.classes))
print((kilobytes("VmHWM") - before) / 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
@pytest.mark.slow
def test_a_million_paths_load_quickly_and_small(tmp_path, index_cache):
    """The index is put into the cache by hand: a million files would take minutes to make."""
    root = tmp_path / "in"
    folders = {"": 0} | {f"class_{c:04d}": 0 for c in range(1000)}
    for folder in folders:
        (root / folder).mkdir(parents=True, exist_ok=True)
    age(root)
    watched = {f"{root}/{folder}": tables.stamp(root / folder) for folder in folders}
    names = (f"class_{c:04d}/image_{i:08d}.JPEG" for c in range(1000) for i in range(1000))
    table = tables.Table(
        {}, {"paths": StringTable.from_strings(names)}, {"linked": False, "notes": []}
    )
    tables.keep_table(f"folder {os.path.realpath(root)}", table, watched, time.time_ns())
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    run = [sys.executable, "-c", MILLION, str(root)]
    out = subprocess.run(run, env=environment, capture_output=True, text=True, check=True).stdout
    first, megabytes = out.splitlines()
    count, seconds, name, classes = first.split()
    assert (count, name, classes) == ("1000000", "class_0987/image_00000654.JPEG", "1000")
    assert float(seconds) < 2
    assert float(megabytes) < 200


def test_labels_are_the_first_folders_however_many_images_each_has():
    counts = [1, 2, 3, 64, 65, 1, 1000]
    names = [f"c{c}/{i:04d}.jpg" for c, count in enumerate(counts) for i in range(count)]
    labels, classes = labels_from_folders(StringTable.from_strings(names))
    assert np.array_equal(labels, np.repeat(np.arange(7), counts))
    assert classes == [f"c{c}" for c in range(7)]


def test_a_user_without_a_home_or_a_name_has_a_cache_too(monkeypatch):
    for name in ("HOME", "MSN_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 54_321)  # nobody's
    assert tables.cache_folder().name == "msn-cache-54321"
