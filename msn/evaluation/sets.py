"""Label sets, features with labels, and some images of a data set."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from msn.errors import UserError
from msn.evaluation.features import Extracted, LabelledSet

_NO_CLASS = -1


class LabelSet(NamedTuple):
    """The images that one classifier may learn from."""

    labels: str
    """How the table calls sets of this size: `1`, `2`, `5`, `1%`, `all`."""
    split: str
    """Which draw or list it is, e.g. `seed 3`, `split1/5imgs_class.txt`."""
    positions: Tensor
    """Images of the training pool, sorted, [n]."""


class FeatureSet(NamedTuple):
    """Features of images with what is known about these."""

    features: Tensor
    """float32 [n, D]."""
    labels: Tensor
    """In [0, C), [n]; -1 for a test image that cannot be read."""
    classes: Sequence[str]
    """Names, C of them."""
    replaced: int = 0
    """Images that cannot be read."""


class ChosenImages:
    """Some images of a labelled set, renumbered from 0.

    Args:
        images: all images.
        positions: which ones, [n].
    """

    def __init__(self, images: LabelledSet, positions: Tensor) -> None:
        self._images, self._positions = images, positions.tolist()
        self.labels = images.labels[positions]
        self.classes = images.classes
        names = images.names
        self.names = [names[i] for i in self._positions]

    def identity(self, i: int) -> str:
        """Changes when image i is another image."""
        return self._images.identity(self._positions[i])

    def __len__(self) -> int:
        """Number of images."""
        return len(self._positions)

    def __getitem__(self, i: int) -> Image.Image:
        """Image i of the chosen ones."""
        return self._images[self._positions[i]]


def labelled_features(images: LabelledSet, found: Extracted) -> FeatureSet:
    """Features to learn from; an image that cannot be read is another one of its class."""
    return FeatureSet(found.rows, images.labels, images.classes, int(found.replaced.sum()))


def held_out_features(images: LabelledSet, found: Extracted) -> FeatureSet:
    """Features to test on; an image that cannot be read counts as wrong whatever is predicted."""
    labels = torch.where(found.replaced, _NO_CLASS, images.labels)
    return FeatureSet(found.rows, labels, images.classes, int(found.replaced.sum()))


def used_positions(sets: Iterable[LabelSet]) -> Tensor:
    """All images that any of the sets uses, sorted: no others need features."""
    return torch.cat([labelled.positions for labelled in sets]).unique()


def renumber(sets: Iterable[LabelSet], positions: Tensor) -> list[LabelSet]:
    """The same sets within the images at sorted `positions`."""
    return [
        labelled._replace(positions=torch.searchsorted(positions, labelled.positions))
        for labelled in sets
    ]


def check_labelled(train: LabelledSet, test: LabelledSet) -> None:
    """Raise a UserError unless both have images, at least two classes, and the same ones."""
    for what, images in (("training", train), ("held-out", test)):
        if len(images) == 0:
            raise UserError(f"evaluation: there are no labelled {what} images")
    if len(train.classes) < 2 or len(train.labels.unique()) < 2:
        found = ", ".join(train.classes[:1]) or "none"
        raise UserError(f"evaluation: at least two classes are needed, found only {found}")
    if list(train.classes) != list(test.classes):
        raise UserError("evaluation: training and held-out images have different classes")
