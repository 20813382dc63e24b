import hashlib
import http.server
import logging
import os
import threading
from functools import partial
from pathlib import Path

import pytest
import torch

from msn.data.subsets import read_names
from msn.errors import UserError
from msn.evaluation.imagenet import (
    OFFICIAL_LISTS,
    OfficialList,
    fetch_lists,
    find_list,
    official_sets,
)
from tests.evaluation.trees import CLASSES, ListedImages, write_lists

REAL_LISTS = os.environ.get("MSN_TEST_SUBSETS")


def a_list(content=b"n01440764_1.JPEG\n", split=1):
    digest = hashlib.sha256(content).hexdigest()
    return OfficialList("1", split, "1imgs_class.txt", digest)


def upstream(root: Path, content=b"n01440764_1.JPEG\n", split=1) -> Path:
    path = root / f"imagenet_subsets{split}" / "1imgs_class.txt"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    return path


@pytest.fixture
def server(tmp_path):
    """A web server of a directory; yields its address, the directory and the requests."""
    root, requests = tmp_path / "served", []
    root.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            requests.append(self.path)

    handler = partial(Handler, directory=str(root))
    with http.server.ThreadingHTTPServer(("localhost", 0), handler) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://localhost:{served.server_port}", root, requests
        served.shutdown()


def test_lists_are_fetched_once_and_kept(tmp_path, server):
    url, root, requests = server
    upstream(root)
    for _ in range(2):
        directory = fetch_lists(tmp_path / "kept", [a_list()], url=url)
        assert read_names(find_list(directory, a_list())) == ["n01440764_1.JPEG"]
    assert requests == ["/imagenet_subsets1/1imgs_class.txt"]


def test_file_addresses_work_too(tmp_path, monkeypatch):
    upstream(tmp_path / "repository")
    monkeypatch.setenv("MSN_SUBSETS_URL", (tmp_path / "repository").as_uri())
    directory = fetch_lists(tmp_path / "kept", [a_list()])
    assert find_list(directory, a_list()).is_file()


def test_a_list_that_is_not_the_papers_is_refused_and_not_kept(tmp_path, server):
    url, root, _ = server
    upstream(root, b"n01440764_2.JPEG\n")
    with pytest.raises(UserError, match="is not the list of the paper"):
        fetch_lists(tmp_path / "kept", [a_list()], url=url)
    assert not (tmp_path / "kept").exists()


def test_a_kept_list_that_was_altered_is_fetched_again(tmp_path, server):
    url, root, requests = server
    upstream(root)
    upstream(tmp_path / "kept", b"altered\n")
    directory = fetch_lists(tmp_path / "kept", [a_list()], url=url)
    assert read_names(find_list(directory, a_list())) == ["n01440764_1.JPEG"]
    assert len(requests) == 1


def test_no_network_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match=r"cannot fetch .* give protocol.lists_dir=DIR"):
        fetch_lists(tmp_path / "kept", [a_list()], url=(tmp_path / "nowhere").as_uri())


def test_the_table_of_lists_is_complete_and_keeps_upstreams_misnomer():
    assert [(entry.labels, entry.split) for entry in OFFICIAL_LISTS] == [
        *((labels, split) for labels in "125" for split in (1, 2, 3)),
        ("1%", 1),
    ]
    paths = [entry.path for entry in OFFICIAL_LISTS]
    assert paths[8] == "imagenet_subsets3/3imgs_class.txt"
    assert paths[5] == "imagenet_subsets3/2imgs_class.txt"
    assert len({entry.sha256 for entry in OFFICIAL_LISTS}) == 10


@pytest.mark.parametrize("folder", ["split{}", "imagenet_subsets{}"])
@pytest.mark.parametrize("misnamed", [True, False])
def test_both_layouts_and_both_names_of_the_misnamed_list_are_read(tmp_path, folder, misnamed):
    images = ListedImages()
    write_lists(tmp_path, images, folder=folder, misnamed=misnamed)
    sets = official_sets(tmp_path, images, shots=[1, 2, 5], one_percent=True)
    assert [(s.labels, s.split) for s in sets] == [
        *((labels, f"split {split}") for labels in "125" for split in (1, 2, 3)),
        ("1%", "split 1"),
    ]
    for labelled in sets[:9]:
        counts = torch.bincount(images.labels[labelled.positions])
        assert counts.tolist() == [int(labelled.labels)] * len(CLASSES)


def test_official_sets_hold_the_listed_images(tmp_path):
    images = ListedImages()
    write_lists(tmp_path, images)
    sets = official_sets(tmp_path, images, shots=[2], one_percent=False)
    assert len(sets) == 3
    for split, labelled in enumerate(sets, start=1):
        listed = read_names(tmp_path / f"split{split}" / "2imgs_class.txt")
        found = {images.names[i].rpartition("/")[2] for i in labelled.positions.tolist()}
        assert found == set(listed)


def test_a_missing_directory_or_list_is_named(tmp_path):
    with pytest.raises(UserError, match="there is no such directory"):
        official_sets(tmp_path / "none", ListedImages(), shots=[1], one_percent=False)
    with pytest.raises(UserError, match="has neither imagenet_subsets1/1imgs_class.txt nor split1"):
        official_sets(tmp_path, ListedImages(), shots=[1], one_percent=False)


def test_a_list_that_lacks_a_class_names_it(tmp_path):
    images = ListedImages()
    write_lists(tmp_path, images)
    path = tmp_path / "split2" / "5imgs_class.txt"
    kept = [line for line in path.read_text().splitlines() if not line.startswith(CLASSES[1])]
    path.write_text("\n".join(kept))
    with pytest.raises(UserError, match=f"0 images of class {CLASSES[1]}, must be 5"):
        official_sets(tmp_path, images, shots=[5], one_percent=False)


def test_a_listed_image_that_is_not_there_is_named(tmp_path):
    images = ListedImages()
    write_lists(tmp_path, images)
    path = tmp_path / "split1" / "1imgs_class.txt"
    path.write_text(path.read_text() + f"{CLASSES[0]}_999999.JPEG\n")
    message = f"1 of {len(CLASSES) + 1} listed images are not in the data: {CLASSES[0]}_999999"
    with pytest.raises(UserError, match=message):
        official_sets(tmp_path, images, shots=[1], one_percent=False)


@pytest.mark.skipif(REAL_LISTS is None, reason="MSN_TEST_SUBSETS names no directory")
def test_the_real_lists_are_those_of_the_table_and_nested(caplog):
    assert REAL_LISTS is not None
    names: dict[tuple[str, int], set[str]] = {}
    with caplog.at_level(logging.WARNING):
        for entry in OFFICIAL_LISTS:
            path = find_list(Path(REAL_LISTS), entry)
            assert hashlib.sha256(path.read_bytes()).hexdigest() == entry.sha256
            names[entry.labels, entry.split] = set(read_names(path))
    for split in (1, 2, 3):
        assert names["1", split] < names["2", split] < names["5", split]
        assert len(names["5", split]) == 5000
    assert names["5", 1] < names["1%", 1]
    assert len(names["1%", 1]) == 12_811
