"""What is kept about an image (features) is kept under an identity that follows its content."""

import os
import shutil

import numpy as np
from PIL import Image

from msn.data.sources import ArraySource, folder_source


def folder(path, shade=0):
    for name in ("a/0.png", "b/0.png"):
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (shade, 0, 0)).save(file)
    return folder_source(str(path), key="data.root", use_labels=True)


def identities(source):
    return [source.identity(i) for i in range(len(source))]


def test_same_names_below_another_root_are_other_images(tmp_path):
    first, second = folder(tmp_path / "one"), folder(tmp_path / "two")
    assert [first.name(i) for i in range(2)] == [second.name(i) for i in range(2)]
    assert not set(identities(first)) & set(identities(second))


def test_a_file_that_is_replaced_is_another_image_and_a_lost_one_still_has_an_identity(tmp_path):
    source = folder(tmp_path)
    before = identities(source)
    assert identities(source) == before
    os.utime(tmp_path / "a/0.png", ns=(1, 1))
    after = identities(source)
    assert after[0] != before[0]
    assert after[1] == before[1]
    shutil.rmtree(tmp_path / "b")
    assert identities(source)[1] not in (before[1], after[0])


def test_arrays_are_told_apart_by_their_pixels():
    pixels = np.zeros((2, 4, 4, 3), np.uint8)
    source = ArraySource(where="memory", pixels=pixels, labels=None, classes=[])
    before = identities(source)
    pixels[1] += 1
    after = identities(source)
    assert after[0] == before[0]
    assert after[1] != before[1]
