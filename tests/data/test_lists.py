"""A list is read once, in little memory, and what is kept of it is never out of date."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from msn.data import lists
from msn.data.lists import Columns, index_list
from msn.errors import UserError
from tests.data.logs import warnings_in

ROWS = "path,label\nb/1.jpg,zebra\n./a/2.jpg,ant\nb/1.jpg,zebra\n/there/3.jpg,cow\n"


def read(file, cache_from=1, use_labels=True):
    base = str(file.parent)
    return index_list(
        str(file), key="data.root", base=base, use_labels=use_labels, cache_from=cache_from
    )


def write(file, text):
    """As if written a while ago: a list changed just now is not trusted."""
    file.write_text(text)
    os.utime(file, (1e9, 1e9))
    return file


def plain(index):
    labels = None if index.labels is None else np.asarray(index.labels).tolist()
    return list(index.paths), labels, index.classes


@pytest.fixture
def readings(monkeypatch):
    """How often a list was read instead of taken from the cache."""
    files = []
    read_list = lists.read_list
    monkeypatch.setattr(
        lists, "read_list", lambda file, **keys: files.append(file) or read_list(file, **keys)
    )
    return files


@pytest.mark.parametrize("use_labels", [True, False])
def test_what_is_kept_is_what_was_read(tmp_path, readings, use_labels):
    file = write(tmp_path / "a.csv", ROWS)
    first, second = (read(file, use_labels=use_labels) for _ in range(2))
    assert len(readings) == 1
    assert plain(first) == plain(second)
    paths = ["b/1.jpg", "./a/2.jpg", "/there/3.jpg"]
    known = ([2, 0, 1], ["ant", "cow", "zebra"]) if use_labels else (None, [])
    assert plain(second) == (paths, *known)


def test_repeated_rows_are_said_from_the_cache_too(tmp_path, readings, caplog):
    file = write(tmp_path / "a.csv", ROWS)
    for _ in range(2):
        read(file)
    first, second = warnings_in(caplog)
    assert len(readings) == 1
    assert (
        first == second == f"data.root={file}: 1 rows repeat an earlier image; duplicates ignored"
    )


def test_labels_asked_for_or_not_are_kept_apart(tmp_path, readings):
    file = write(tmp_path / "a.csv", ROWS)
    assert read(file, use_labels=False).labels is None
    assert read(file).labels.tolist() == [2, 0, 1]
    assert len(readings) == 2


def test_a_list_is_read_again_when_it_changed_or_has_just_been_written(tmp_path, readings):
    file = write(tmp_path / "a.csv", ROWS)
    read(file)
    write(file, ROWS.replace("cow", "elk"))  # same size, another time
    os.utime(file, (1.1e9, 1.1e9))
    assert read(file).classes == ["ant", "elk", "zebra"]
    write(file, ROWS.replace("cow", "horse"))  # another size at the same time
    os.utime(file, (1.1e9, 1.1e9))
    assert read(file).classes == ["ant", "horse", "zebra"]
    assert len(readings) == 3
    file.write_text(ROWS)  # just now
    assert read(file).classes == read(file).classes == ["ant", "cow", "zebra"]
    assert len(readings) == 5


def test_a_short_list_is_not_kept(tmp_path, readings):
    file = write(tmp_path / "a.csv", ROWS)
    for _ in range(2):
        read(file, cache_from=4)
    assert len(readings) == 2


def test_paths_whose_hashes_agree_are_still_two(tmp_path, monkeypatch):
    monkeypatch.setattr(lists, "hash", lambda text: 7, raising=False)
    index = read(write(tmp_path / "a.txt", "1.jpg\n2.jpg\n./1.jpg\n"))
    assert list(index.paths) == ["1.jpg", "2.jpg"]


# Not ru_maxrss: a process starts with the peak of the one that started it.
MILLION = """
import sys, time
from pathlib import Path
from msn.data.sources import list_source
def kilobytes(name):
    return int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0])
before = kilobytes("VmRSS")
start = time.perf_counter()
found = list_source(sys.argv[1], key="root", root=None, use_labels=True)
seconds = time.perf_counter() - start
print(len(found), found.name(987_654), found.labels[987_654], len(found.classes))
print(seconds, (kilobytes("VmHWM") - before) / 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
@pytest.mark.slow
def test_a_list_of_a_million_is_read_small_and_then_loads_quickly(tmp_path, index_cache):
    rows = [f"c{i // 1000:03d}/image_{i:08d}.JPEG,c{i // 1000:03d}\n" for i in range(1_000_000)]
    file = write(tmp_path / "million.csv", "".join([*rows, rows[0]]))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    run = [sys.executable, "-c", MILLION, str(file)]
    for number in range(2):
        out = subprocess.run(run, env=environment, capture_output=True, text=True, check=True)
        found, measured = out.stdout.splitlines()
        assert found == "1000000 c987/image_00987654.JPEG 987 1000"
        seconds, megabytes = map(float, measured.split())
        assert megabytes < 200
        assert number == 0 or seconds < 2
        assert len(list(index_cache.glob("index-*.bin"))) == 1


@pytest.mark.parametrize(
    ("header", "columns"),
    [
        ("image_id,diagnosis", Columns(label="diagnosis", suffix=".jpg")),
        ("id;kind", Columns(image="id", label="kind", suffix=".jpg")),
        ("scan\tcategory", Columns(image="scan", suffix=".jpg")),
    ],
)
def test_tables_of_other_names_are_read_by_named_columns_and_ending(tmp_path, header, columns):
    separator = next(s for s in ",;\t" if s in header)
    rows = [header, *(separator.join((f"p{i}", "ab"[i % 2])) for i in range(4))]
    (tmp_path / "train.csv").write_text("\n".join(rows))
    index = index_list(
        str(tmp_path / "train.csv"), key="data.root", base="/x", use_labels=True, columns=columns
    )
    assert list(index.paths) == [f"p{i}.jpg" for i in range(4)]
    assert index.classes == ["a", "b"]


def test_a_column_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    (tmp_path / "x.csv").write_text("path,label\na.jpg,1\n")
    for columns in (Columns(label="kind"), Columns(image="kind")):
        with pytest.raises(UserError, match=r"=kind: the header .* columns seen: 'path', 'label'"):
            index_list(
                str(tmp_path / "x.csv"), key="k", base="/x", use_labels=True, columns=columns
            )


def test_continuous_numbers_are_no_classes(tmp_path):
    def index(values):
        rows = "".join(f"{i}.jpg,{value}\n" for i, value in enumerate(values))
        (tmp_path / "x.csv").write_text("path,target\n" + rows)
        return index_list(str(tmp_path / "x.csv"), key="k", base="/x", use_labels=True)

    with pytest.raises(UserError, match=r"continuous numbers \(60 different ones, such as 0.5\)"):
        index([i + 0.5 for i in range(60)])
    assert len(index(range(60)).classes) == 60
    assert len(index([0, 1 / 3, 2 / 3, 1] * 20).classes) == 4


def row(separator, *, path="p{}.jpg", label="{}"):
    """Four rows with the labels a and b."""
    return "\n".join(f"{path.format(i)}{separator}{label.format('ab'[i % 2])}" for i in range(4))


NO_HEADER = "no header that names the column of paths; columns seen: "
# Layouts, as tables and people write them: name of the file, content, and the classes or what is
# said instead. The shown table is that of docs/data.md.
LAYOUTS = {
    "commas": ("a.csv", row(","), ["a", "b"]),
    "semicolons": ("a.csv", row(";"), ["a", "b"]),
    "tabs": ("a.txt", row("\t"), ["a", "b"]),
    "TSV": ("a.tsv", "filename\tclass\n" + row("\t"), ["a", "b"]),
    "quoted": ("a.csv", "path,label\n" + row(",", label='"x, ""{}"""'), ['x, "a"', 'x, "b"']),
    "spaced names": ("a.csv", "Image Index , Class-Name\n" + row(" , "), ["a", "b"]),
    "spaces in paths": ("a.txt", "my p 1.jpg\nmy, p 2.jpg", []),
    "byte order mark": ("a.csv", b"\xef\xbb\xbfpath,label\n" + row(",").encode(), ["a", "b"]),
    "CRLF": ("a.csv", ("path,label\n" + row(",")).replace("\n", "\r\n"), ["a", "b"]),
    "absolute": ("a.csv", row(",", path="/there/p{}.jpg"), ["a", "b"]),
    "Latin-1": ("a.csv", row(",", label="\xe9{}").encode("latin-1"), ["\udce9a", "\udce9b"]),
    "floats": ("a.csv", "path,label\n1.jpg,1.0\n2.jpg,0.0\n3.jpg,", ["0.0", "1.0"]),
    "repeated": ("a.csv", row(",") + "\n" + row(","), ["a", "b"]),
    "index of pandas": ("a.csv", ",path,label\n0,1.jpg,a\n1,2.jpg,b", ["a", "b"]),
    "several labels": ("a.csv", "path,class,label\n1.jpg,0,a\n2.jpg,1,b", ["a", "b"]),
    "one-hot, header": ("a.csv", "image,MEL,NV\n1.jpg,1,0\n2.jpg,0,1", []),
    "one-hot": ("a.csv", "1.jpg,1,0\n2.jpg,0,1", "columns seen: '1.jpg', '1', '0'; a first line"),
    "two ways": ("a.csv", "1.jpg,1\n2.jpg,1.0\n3.jpg,2", "1 and 1.0, which are one number"),
    "nan": ("a.csv", "1.jpg,1\n2.jpg,2\n3.jpg,nan", "numbers and nan; the cell of an image"),
    "label first": (
        "a.csv",
        "a,1.jpg\nb,2.jpg",
        r"\(column 2 may be\) and " + NO_HEADER + "'a', '1.j",
    ),
    "spaces": ("a.csv", "path label\n" + row(" "), NO_HEADER + "'path label'; separators tried"),
    "pipes": ("a.csv", "path|label\n" + row("|"), NO_HEADER + r"'path\|label'"),
    "other names": ("a.csv", "id,y\n1,a", NO_HEADER + "'id', 'y'.*data.image_column=NAME says"),
    "JSON lines": ("a.jsonl", '{"path": "1.jpg", "label": "a"}', NO_HEADER + ".*path"),
    "UTF-16": ("a.csv", row(",").encode("utf-16"), "line 1 is not text in UTF-8"),
    "header alone": ("a.csv", "path,label\n", "lists no image"),
    "empty": ("a.csv", "", "lists no image"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_layout_is_read_or_refused_in_one_line(tmp_path, name):
    file, content, expected = LAYOUTS[name]
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    if isinstance(expected, list):
        index = read(tmp_path / file)
        assert index.classes == expected
        assert all(path.endswith(".jpg") for path in index.paths)
        return
    with pytest.raises(UserError, match=expected) as caught:
        read(tmp_path / file)
    assert "\n" not in str(caught.value)


def test_columns_that_are_not_read_are_named(tmp_path, caplog):
    caplog.set_level("INFO", "msn")
    read(write(tmp_path / "a.csv", "path,label,class\n1.jpg,a,0\n2.jpg,b,1\n"))
    assert "paths: 'path'; labels: 'label'; not read: ['class']" in caplog.text
