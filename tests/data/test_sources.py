"""Folders, lists and CSV files become the same numbered images, with labels where there are any."""

import os

import numpy as np
import pytest

from msn.data.decode import full_size
from msn.data.sources import folder_source, list_source
from msn.errors import UserError
from tests.data.photos import make_folder, photo


def open_folder(root, use_labels=True):
    return folder_source(str(root), key="data.root", use_labels=use_labels)


def open_list(path):
    return list_source(str(path), key="data.root", root=None, use_labels=True)


def names(source):
    return [source.name(i) for i in range(len(source))]


def test_a_nested_folder_has_its_first_folders_as_classes(tmp_path):
    make_folder(tmp_path, classes=2, images=2)
    (tmp_path / "class_1" / "deep" / "er").mkdir(parents=True)
    photo(9).save(tmp_path / "class_1" / "deep" / "er" / "x.PNG")
    (tmp_path / "class_1" / "notes.txt").write_text("no image")
    (tmp_path / ".hidden").mkdir()
    photo(9).save(tmp_path / ".hidden" / "x.png")
    source = open_folder(tmp_path)
    assert names(source) == [
        "class_0/0.jpg",
        "class_0/1.jpg",
        "class_1/0.jpg",
        "class_1/1.jpg",
        "class_1/deep/er/x.PNG",
    ]
    assert source.classes == ["class_0", "class_1"]
    assert source.labels.tolist() == [0, 0, 1, 1, 1]
    assert open_folder(tmp_path, use_labels=False).labels is None


def test_a_flat_folder_one_class_and_a_mixed_folder_have_no_labels(tmp_path):
    make_folder(tmp_path / "a", classes=1)
    assert open_folder(tmp_path / "a" / "class_0").labels is None
    assert open_folder(tmp_path / "a").labels is None
    make_folder(tmp_path / "b", classes=2)
    photo(0).save(tmp_path / "b" / "loose.jpg")
    assert open_folder(tmp_path / "b").labels is None
    assert len(open_folder(tmp_path / "b")) == 9


def test_links_are_followed_and_a_loop_ends(tmp_path):
    make_folder(tmp_path / "real", classes=1, images=2)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    assert names(open_folder(tmp_path / "in")) == [f"linked/class_0/{i}.jpg" for i in range(2)]


def test_file_names_of_any_bytes_can_be_read(tmp_path):
    for name in (b"caf\xe9.jpg", "café.jpg".encode(), b"line\nbreak.jpg"):
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            photo(3).save(file, "JPEG")
    source = open_folder(tmp_path)
    assert len(source) == 3
    for i in range(3):
        assert source.decode(i, full_size).pixels.shape == (48, 64, 3)


def test_lists_and_csv_files_name_the_same_images_as_their_folder(tmp_path):
    folder = open_folder(make_folder(tmp_path / "in"))
    plain, table, labelled = tmp_path / "a.txt", tmp_path / "b.csv", tmp_path / "c.csv"
    plain.write_text("\n".join(f"in/{name}" for name in names(folder)) + "\n\n")
    absolute = [str(tmp_path / "in" / name) for name in names(folder)]
    table.write_text("path\n" + "\n".join(absolute))
    rows = [f'"{a}", {name.split("/")[0]}' for a, name in zip(absolute, names(folder), strict=True)]
    labelled.write_text("Path,label\n" + "\n".join(rows))
    for path in (plain, table, labelled):
        source = open_list(path)
        assert len(source) == len(folder)
        for i in (0, 11):
            ours, theirs = (s.decode(i, full_size).pixels for s in (source, folder))
            assert np.array_equal(ours, theirs)
    assert open_list(plain).labels is None
    assert open_list(table).labels is None
    assert open_list(labelled).labels.tolist() == folder.labels.tolist()
    assert open_list(labelled).classes == folder.classes


def test_what_is_wrong_with_folders_and_lists_is_said(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("")
    (tmp_path / "half.csv").write_text("a.jpg,cat\nb.jpg,\n")
    for root, message in (
        ("nowhere", "there is no such folder"),
        ("empty", "is an empty folder"),
        ("text", "holds no image"),
        ("half.csv", "is a file, must be a folder"),
    ):
        with pytest.raises(UserError, match=f"data.root=.*{root}: {message}"):
            open_folder(tmp_path / root)
    for path, message in (
        ("nowhere.txt", "there is no such file"),
        ("text/a.txt", "lists no image"),
        ("half.csv", "b.jpg has no label"),
    ):
        with pytest.raises(UserError, match=f"data.root=.*{path}: {message}"):
            open_list(tmp_path / path)
