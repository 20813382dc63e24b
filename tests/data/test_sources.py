"""Folders, lists and CSV files become the same numbered images, with labels where there are any."""

import os

import numpy as np
import pytest

from msn.data.lists import index_list
from msn.data.sources import folder_source, list_source, torchvision_source
from msn.errors import UserError
from msn.images.decode import full_size
from msn.images.kinds import BadImageError
from tests.data.logs import warnings_in
from tests.data.photos import make_folder, photo
from tests.data.test_pools import pools
from tests.data.torchvision_copies import make_copies


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
    for name in ("y.jfif", "z.pjpeg"):  # as browsers save them
        photo(8).save(tmp_path / "class_1" / name, "JPEG")
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
        "class_1/y.jfif",
        "class_1/z.pjpeg",
    ]
    assert source.classes == ["class_0", "class_1"]
    assert source.labels.tolist() == [0, 0, 1, 1, 1, 1, 1]
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


HEADERS = {
    "Path,width,height,LABEL\na.jpg,64,48,cat\nb.jpg,64,48,dog\n": ["cat", "dog"],
    "class, Filename\ncat, a.jpg\ndog, b.jpg\n": ["cat", "dog"],
    "\nimage,file,class,label\n1,a.jpg,x,cat\n2,b.jpg,x,dog\n": ["cat", "dog"],
    "filepath,width\na.jpg,64\nb.jpg,48\n": [],
    "IMAGE\na.jpg\nb.jpg\n": [],
    "a.jpg,image\nb.jpg,label\n": ["image", "label"],
    "image_id,label\na.jpg,cat\nb.jpg,dog\n": ["cat", "dog"],
    "path;label\na.jpg;cat\nb.jpg;dog\n": ["cat", "dog"],
    "a.jpg;cat\nb.jpg;dog\n": ["cat", "dog"],
    "label\tFile_Name\ncat\ta.jpg\ndog\tb.jpg\n": ["cat", "dog"],
    "a.jpg\tcat\nb.jpg\tdog\n": ["cat", "dog"],
    'path,label\n"a.jpg","cat, big"\n"b.jpg",dog\n': ["cat, big", "dog"],
    "path,label\na.jpg,cat\npath,label\nb.jpg,dog\n": ["cat", "dog"],  # two files put together
}


@pytest.mark.parametrize("text", HEADERS)
@pytest.mark.parametrize("ending", [".csv", ".tsv", ".txt"])
def test_columns_are_taken_by_the_names_in_a_header(text, ending, tmp_path):
    file = tmp_path / f"a{ending}"
    file.write_text(text)
    source = open_list(file)
    assert names(source) == ["a.jpg", "b.jpg"]
    assert source.classes == HEADERS[text]
    assert (source.labels is None) == (not HEADERS[text])


def test_a_text_list_may_have_a_header_too(tmp_path):
    (tmp_path / "a.txt").write_text("path\na, b.jpg\n")
    assert names(open_list(tmp_path / "a.txt")) == ["a, b.jpg"]


def test_an_image_that_is_there_decides_between_separators_and_what_has_no_ending(tmp_path):
    for name in ("a;b.jpg", "c,d.jpg", "number7"):
        photo(1).save(tmp_path / name, "JPEG")
    for file, text, expected in (
        ("1.csv", "a;b.jpg,cat\n", ["a;b.jpg"]),
        ("2.csv", "c,d.jpg;cat\n", ["c,d.jpg"]),
        ("3.csv", "number7,cat\nnumber8,dog\n", ["number7", "number8"]),
        ("4.txt", "c,d.jpg\n", ["c,d.jpg"]),
        ("5.txt", "number7,cat\n", ["number7"]),
        ("6.txt", '"a;b.jpg"\n', ["a;b.jpg"]),
    ):
        (tmp_path / file).write_text(text)
        assert names(open_list(tmp_path / file)) == expected


def test_a_name_of_any_bytes_and_a_column_of_any_bytes_pass_through_a_list(tmp_path):
    make_folder(tmp_path / "in", classes=1, images=2)
    (tmp_path / "in").rename(os.fsdecode(os.path.join(os.fsencode(tmp_path), b"caf\xe9")))
    (tmp_path / "a.csv").write_bytes(
        b"path,label\ncaf\xe9/class_0/0.jpg,\xe9\ncaf\xe9/class_0/1.jpg,e\n"
    )
    source = open_list(tmp_path / "a.csv")
    assert source.decode(0, full_size).pixels.shape == (48, 64, 3)
    assert sorted(map(os.fsencode, source.classes)) == [b"e", b"\xe9"]


def test_a_row_that_is_no_regular_file_is_a_bad_image(tmp_path):
    make_folder(tmp_path / "in", classes=1, images=1)
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "a.txt").write_text("in/class_0/0.jpg\npipe.jpg\nzero.jpg\nfolder.jpg\n")
    source = open_list(tmp_path / "a.txt")
    assert source.decode(0, full_size).pixels.shape == (48, 64, 3)
    for i in (1, 2, 3):
        with pytest.raises(BadImageError, match="not a regular file|Is a directory"):
            source.decode(i, full_size)
    (tmp_path / "a.txt").write_text("pipe.jpg\nin/class_0/0.jpg\n")
    assert len(pools(tmp_path / "a.txt", source="list").train) == 2


UNREADABLE_LISTS = {  # rows: what is said
    "C:\\data\\x.jpg\nC:\\data\\y.jpg\n": r"C:\\data\\x.jpg \(No such file .*with / between",
    "https://there.org/x.jpg\n": r"no image can be read; .*no URLs",
    "image_id,label\n000c14,2\n000c15,1\n": r"no image can be read; .*with their endings",
    "x.jpg,cat\n": r"relative paths start at TMP",
}


@pytest.mark.parametrize("text", UNREADABLE_LISTS)
def test_a_list_of_what_is_not_there_says_what_paths_must_be(text, tmp_path):
    (tmp_path / "a.csv").write_text(text)
    message = UNREADABLE_LISTS[text].replace("TMP", str(tmp_path))
    with pytest.raises(UserError, match=message):
        pools(tmp_path / "a.csv", source="list")


@pytest.mark.parametrize("rows", [40, 1080])
@pytest.mark.parametrize("separator", [",", ";", "\t", " "])
@pytest.mark.parametrize("ending", [".csv", ".txt"])
def test_a_header_that_is_not_known_is_never_an_image(rows, separator, ending, tmp_path):
    lines = ["number", *(f"{i}.jpg" for i in range(rows))]
    labels = ["kind", *(f"{i % 3}" for i in range(rows))]
    text = "\n".join(f"{a}{separator}{b}" for a, b in zip(lines, labels, strict=True))
    (tmp_path / f"a{ending}").write_text(text)
    with pytest.raises(UserError, match="is no image and no header that .*seen: 'number") as caught:
        open_list(tmp_path / f"a{ending}")
    assert "separators tried: comma, semicolon, tab" in str(caught.value)


DAMAGED_LISTS = {
    "a.jpg\nb.jpg\n".encode("utf-16"): r"line 1 is not text in UTF-8",
    b"a.jpg\nb\0.jpg\n": r"line 2 is not text in UTF-8",
    b'a.jpg,cat\n"b.jpg,dog\nc.jpg,dog\n': r"the row from line 2 on is not CSV",
    b'a.jpg,cat\n"b.jpg\n' + b"c.jpg,dog\n" * 20_000: r"the row from line 2 on is not CSV",
    b"a.jpg,cat\n,dog\n": r"line 2 has no path",
    b"photo,label\na.jpg,cat\n": (
        r"the first row is no image and no header that names the column of paths; columns seen: "
        r"'photo', 'label'; separators tried: comma, semicolon, tab; the header must name one of"
    ),
    b"7,a.jpg,cat\n": r"the first row is no image \(column 2 may be\) and no header",
}


@pytest.mark.parametrize("data", DAMAGED_LISTS, ids=range(len(DAMAGED_LISTS)))
def test_damaged_lists_end_in_one_line_that_names_them(data, tmp_path):
    (tmp_path / "a.csv").write_bytes(data)
    with pytest.raises(UserError, match=f"data.root=.*/a.csv: {DAMAGED_LISTS[data]}") as caught:
        open_list(tmp_path / "a.csv")
    assert "\n" not in str(caught.value)


def test_an_image_that_is_listed_twice_counts_once(tmp_path, caplog):
    listed = tmp_path / "a.csv"
    rows = ["x/a.jpg,cat", "b.jpg,dog", "./x/a.jpg,cat", "x/../b.jpg,dog", "x//a.jpg,cat"]
    listed.write_text("\n".join([*rows, f"{tmp_path}/b.jpg,dog", "a.jpg,cat"]))
    source = open_list(listed)
    assert names(source) == ["x/a.jpg", "b.jpg", "a.jpg"]
    assert source.labels.tolist() == [0, 1, 0]
    assert warnings_in(caplog) == [
        f"data.root={listed}: 4 rows repeat an earlier image; duplicates ignored"
    ]


def test_an_image_with_two_labels_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("a.jpg,cat\nb.jpg,dog\n./a.jpg,dog\n")
    with pytest.raises(UserError, match=r"a.csv: ./a.jpg .*'cat' \(line 1\) and 'dog' \(line 3\)"):
        open_list(tmp_path / "a.csv")
    without = list_source(str(tmp_path / "a.csv"), key="root", root=None, use_labels=False)
    assert names(without) == ["a.jpg", "b.jpg"]


@pytest.mark.parametrize("cache_from", [1, 100])
def test_rows_without_a_label_train_and_are_not_evaluated(tmp_path, caplog, cache_from):
    (tmp_path / "part.csv").write_text("a.jpg,cat\nb.jpg,\nc.jpg,dog\nd.jpg,\n")
    for _ in range(2):  # the second time from what is kept
        index = index_list(
            str(tmp_path / "part.csv"),
            key="data.root",
            base=str(tmp_path),
            use_labels=True,
            cache_from=cache_from,
        )
        assert index.labels.tolist() == [0, -1, 1, -1]
    assert sum("2 of 4 rows have no label" in line for line in warnings_in(caplog)) == 2


def test_what_is_wrong_with_folders_and_lists_is_said(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("")
    (tmp_path / "half.csv").write_text("a.jpg,cat\na.jpg,dog\n")
    for root, message in (
        ("nowhere", "there is no such folder"),
        ("empty", "is an empty folder"),
        ("text", "holds no image"),
        ("half.csv", "is a file; it must be a folder"),
    ):
        with pytest.raises(UserError, match=f"data.root=.*{root}: {message}"):
            open_folder(tmp_path / root)
    for path, message in (
        ("nowhere.txt", "there is no such file"),
        ("text/a.txt", "lists no image"),
        ("half.csv", "a.jpg is there twice"),
    ):
        with pytest.raises(UserError, match=f"data.root=.*{path}: {message}"):
            open_list(tmp_path / path)


def test_torchvision_s_sets_in_their_own_folders(tmp_path, monkeypatch):
    make_copies(tmp_path, monkeypatch)
    for name in ("dtd", "aircraft", "cars", "cifar10", "cifar100", "flowers", "food", "pets"):
        for split in ("train", "test"):
            found = torchvision_source(name, str(tmp_path), split=split, download=False)
            classes = 102 if name == "flowers" else 3
            assert len(found.classes) == classes
            per_class = np.bincount(found.labels, minlength=classes)
            repeats = 5 if (name, split) == ("cifar10", "train") else 1  # batches
            many = 4 * repeats if classes == 3 else {"train": 2, "test": 1}[split]
            assert per_class.tolist() == [many] * classes
            for i in (0, len(found) - 1):
                shade = found.rgb(i).getpixel((4, 4))[0]
                color = found.labels[i] if classes == 3 else (found.labels[i] + 1) % 3
                assert shade == pytest.approx(200 * color / 3, abs=40)
        train, test = (
            {
                found.identity(i).split()[0]
                for found in [torchvision_source(name, str(tmp_path), split=s, download=False)]
                for i in range(len(found))
            }
            for s in ("train", "test")
        )
        assert not train & test
    with pytest.raises(UserError, match="no pets here as torchvision keeps it"):
        torchvision_source("pets", str(tmp_path / "other"), split="test", download=False)
