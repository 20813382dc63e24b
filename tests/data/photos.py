"""Small real photographs for the tests of the data room, cut from the two of scikit-learn."""

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

WIDTH, HEIGHT = 64, 48


def photo(number: int) -> Image.Image:
    """One of many different 64 x 48 px cut-outs."""
    whole = load_photos()[number % 2]
    top, left = 7 * number % (whole.shape[0] - HEIGHT), 13 * number % (whole.shape[1] - WIDTH)
    return Image.fromarray(whole[top : top + HEIGHT, left : left + WIDTH])


def load_photos() -> list[np.ndarray]:
    """The two photographs, uint8 [427, 640, 3]; loaded once."""
    if not _PHOTOS:
        _PHOTOS.extend(load_sample_images().images)
    return _PHOTOS


_PHOTOS: list[np.ndarray] = []


def make_folder(root: Path, *, classes: int = 3, images: int = 4, suffix: str = ".jpg") -> Path:
    """A labelled folder: root/class_0/0.jpg, ..."""
    for c in range(classes):
        folder = root / f"class_{c}"
        folder.mkdir(parents=True)
        for i in range(images):
            photo(c * images + i).save(folder / f"{i}{suffix}")
    return root
