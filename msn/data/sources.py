"""Sources of images: files in folders or lists, and arrays in memory.

A source is a numbered collection of named images, with or without labels. It decodes an image or
raises `BadImageError`; the caller handles that. The arrays are scikit-learn's digits and
torchvision's small data sets.
"""

from __future__ import annotations

import hashlib
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.datasets import (
    CIFAR10,
    CIFAR100,
    DTD,
    STL10,
    FGVCAircraft,
    Flowers102,
    Food101,
    OxfordIIITPet,
    StanfordCars,
)

from msn.data.index import scan_folder
from msn.data.layout import FolderLabels, read_folder_labels
from msn.data.lists import BY_NAME, Columns, index_list
from msn.data.tables import StringTable
from msn.errors import UserError
from msn.images.decode import DecodedImage, decode, extremes, full_size
from msn.images.depth import Depth, depth_for, levels_of
from msn.images.kinds import FORMATS, SUFFIXES, BadImageError, read_file

log = logging.getLogger(__name__)

_LOOKED_AT = 64  # images whose values decide the depth
_NAMES_LOOKED_AT = 4096  # names among which these images are chosen
# Formats of 8 bits; a name without an ending may be of any format.
_SHALLOW = set(SUFFIXES) - {".png", ".tif", ".tiff"}
_IN_MEMORY = {"cifar10": CIFAR10, "cifar100": CIFAR100}
# Data sets that keep files, and which of their splits are labelled images to learn from.
_IN_FILES = {
    "dtd": (DTD, ("train", "val")),
    "aircraft": (FGVCAircraft, ("trainval",)),
    "cars": (StanfordCars, ("train",)),
    "flowers": (Flowers102, ("train", "val")),
    "food": (Food101, ("train",)),
    "pets": (OxfordIIITPet, ("trainval",)),
}
TORCHVISION = (*_IN_MEMORY, "stl10", *_IN_FILES)


class Source(ABC):
    """A numbered collection of images."""

    where: str  # name in messages, for instance the folder
    labels: np.ndarray | None  # class numbers, int64 [n], -1 for an image without a label
    classes: list[str]  # names of the classes, empty without labels
    depth: Depth | None = None  # black and white in images of more than 8 bits; None is 16 bits
    why: str = ""  # the reason why there are no labels, and what to do about it
    groups: np.ndarray | None = None  # numbers of `group_names`, int64 [n]; None without groups
    group_names: Sequence[str] = ()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, i: int) -> str:
        """Name of image i, for instance its path relative to the root."""

    def identity(self, i: int) -> str:
        """A key for caches: it changes when image i changes."""
        return f"{os.path.realpath(self.where)}/{self.name(i)}"

    @abstractmethod
    def read(self, i: int) -> bytes:
        """The bytes of the file of image i.

        Raises:
            BadImageError: they cannot be read.
        """

    def decode(self, i: int, allowed_reduction: Callable[[int, int], int]) -> DecodedImage:
        """Decode image i.

        Raises:
            BadImageError: it cannot be read.
        """
        return decode(self.read(i), allowed_reduction, levels_of(self.depth))

    def rgb(self, i: int) -> Image.Image:
        """Image i at its full size."""
        return Image.fromarray(self.decode(i, full_size).pixels)


@dataclass(eq=False, kw_only=True)
class FileSource(Source):
    """Image files, by paths relative to a root."""

    where: str
    root: str
    paths: StringTable
    labels: np.ndarray | None
    classes: list[str]
    why: str = ""
    linked: bool = True  # whether some of the paths may lead through links
    groups: np.ndarray | None = None
    group_names: Sequence[str] = ()

    def __len__(self) -> int:
        """Number of files."""
        return len(self.paths)

    def name(self, i: int) -> str:
        """Path of image i relative to the root."""
        return self.paths[i]

    def path(self, i: int) -> str:
        """Absolute path of file i."""
        return os.path.join(os.path.abspath(self.root), self.paths[i])

    def identity(self, i: int) -> str:
        """Where file i is, its size and the time of its last change."""
        path = os.path.join(self.root, self.paths[i])
        try:
            status = os.stat(path)
        except OSError:
            return f"{os.path.realpath(path)} missing"
        return f"{os.path.realpath(path)} {status.st_size} {status.st_mtime_ns}"

    def read(self, i: int) -> bytes:
        """The bytes of file i."""
        return read_file(os.path.join(self.root, self.paths[i]))


@dataclass(eq=False, kw_only=True)
class ArraySource(Source):
    """Images of one size in memory."""

    where: str
    pixels: np.ndarray  # uint8 [n, H, W, 3]
    labels: np.ndarray | None
    classes: list[str]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.pixels)

    def name(self, i: int) -> str:
        """Where the image is, with its number."""
        return f"{self.where}[{i}]"

    def identity(self, i: int) -> str:
        """Name and pixels."""
        return f"{self.name(i)} {hashlib.sha256(self.read(i)).hexdigest()}"

    def read(self, i: int) -> bytes:
        """The pixels of image i, which are in no file."""
        return np.ascontiguousarray(self.pixels[i]).tobytes()

    def decode(self, i: int, allowed_reduction: Callable[[int, int], int]) -> DecodedImage:
        """The pixels of image i; there is nothing to decode."""
        _, height, width, _ = self.pixels.shape
        return DecodedImage(self.pixels[i], height, width, 1)


def find_depth(source: Source, depth: str | Depth) -> Depth | None:
    """The depth of a data set: as set, or with `auto` as a sample of the images needs.

    For unsigned values it is the smallest number of bits, at least 8, that holds the largest value.
    With negative values, or with 0 and 1 alone, the smallest and the largest value are black and
    white. If all values are 0, it is 16 bits. The answer is logged once.

    Returns:
        None where `auto` finds no image of more than 8 bits.
    """
    if not isinstance(depth, str):
        return depth
    names = np.linspace(0, len(source) - 1, min(_NAMES_LOOKED_AT, len(source))).astype(np.int64)
    endings = ((i, os.path.splitext(source.name(i))[1].lower()) for i in names.tolist())
    deep = [i for i, ending in endings if ending not in _SHALLOW]
    chosen = np.linspace(0, len(deep) - 1, min(_LOOKED_AT, len(deep))).astype(np.int64)
    found = []
    for i in chosen.tolist():
        try:
            found.append(extremes(source.read(deep[i])))
        except BadImageError:  # reported when the image is used
            continue
    ranges = [pair for pair in found if pair is not None]
    if not ranges:
        return None
    low, high = min(pair[0] for pair in ranges), max(pair[1] for pair in ranges)
    needed = depth_for((low, high))
    log.info(
        "%s: %d of %d images looked at have more than 8 bits, with values from %d to %d: "
        "data.depth=%s, so that %d is white",
        *(source.where, len(ranges), len(found), low, high),
        *(str(needed).replace(" ", ""), levels_of(needed)[1]),
    )
    if low == high == 0:
        log.warning(
            "%s: the images of more than 8 bits that were looked at are all black, which does not "
            "tell how bright others are: data.depth=12, for instance, sets it",
            source.where,
        )
    return needed


def folder_source(root: str, *, key: str, use_labels: bool) -> FileSource:
    """Index a folder of images, nested or flat, with the labels that its folders give.

    Args:
        root: the folder.
        key: the setting it came from, for messages.
        use_labels: False leaves the images without labels whatever their folders are called.

    Raises:
        UserError: the folder is missing, not a folder or unreadable, it holds no image, or its
            folders are neither classes nor parts.
    """
    check_folder(root, key=key)
    try:
        paths, linked = scan_folder(root)
    except OSError as error:
        raise UserError(f"{key}={root}: cannot be read ({error.strerror})") from error
    if not len(paths):
        inside = os.listdir(root)
        what = f"holds no image ({', '.join(FORMATS)})" if inside else "is an empty folder"
        if any(name.endswith((".parquet", ".arrow")) for name in inside):
            what += "; data=hf reads .parquet and .arrow"
        raise UserError(f"{key}={root}: {what}")
    found = FolderLabels(None, [], "data.use_labels=false")
    if use_labels:
        found = read_folder_labels(paths, where=f"{key}={root}")
    return FileSource(where=root, root=root, paths=paths, linked=linked, **found._asdict())


def check_folder(root: str, *, key: str) -> None:
    """Raise a UserError unless `root` is an existing folder."""
    if not os.path.exists(root):
        raise UserError(f"{key}={root}: there is no such folder")
    if not os.path.isdir(root):
        raise UserError(f"{key}={root}: is a file; it must be a folder")


def list_source(
    file: str, *, key: str, root: str | None, use_labels: bool, columns: Columns = BY_NAME
) -> FileSource:
    """Read a list of image paths: a text file with a path per line, or CSV (see `index_list`).

    Args:
        file: the list.
        key: the setting it came from, for messages.
        root: what relative paths start from; None takes the list's own folder.
        use_labels: False ignores the labels.
        columns: names of columns, and the images' ending, as set.

    Raises:
        UserError: the list is missing, damaged or empty, or has two labels for one image.
    """
    base = root if root is not None else os.path.dirname(os.path.abspath(file))
    index = index_list(file, key=key, base=base, use_labels=use_labels, columns=columns)
    return FileSource(where=file, root=base, **index._asdict())


def digits_source(image_size: int) -> ArraySource:
    """Load the 1,797 handwritten digits that ship with scikit-learn, upsampled to RGB.

    Args:
        image_size: side in px to which the 8 x 8 px originals are upsampled (bicubic).
    """
    digits = load_digits()
    small = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)
    large = F.interpolate(small, size=(image_size, image_size), mode="bicubic")
    gray = large.round().clamp(0, 255).to(torch.uint8).numpy()[:, 0]
    return ArraySource(
        where="digits",
        pixels=np.stack([gray] * 3, axis=-1),
        labels=digits.target.astype(np.int64),
        classes=[str(i) for i in range(10)],
    )


def torchvision_source(name: str, root: str, *, split: str, download: bool) -> Source:
    """Load one of torchvision's data sets.

    Args:
        name: one of `TORCHVISION`.
        root: the folder in which torchvision keeps it.
        split: `train` (all labelled images that do not test) or `test`; STL-10 also has
            `unlabeled`.
        download: whether torchvision may fetch it.

    Raises:
        UserError: it is not there, or damaged.
    """
    try:
        if name in _IN_FILES:
            return _torchvision_files(name, root, split=split, download=download)
        if name == "stl10":
            stl = STL10(root, split=split, download=download)
            pixels = np.ascontiguousarray(stl.data.transpose(0, 2, 3, 1))
            labels, classes = stl.labels.astype(np.int64), list(stl.classes)
        else:
            cifar = _IN_MEMORY[name](root, train=split == "train", download=download)
            pixels = cifar.data
            labels, classes = np.array(cifar.targets, np.int64), list(cifar.classes)
    except (RuntimeError, OSError, ValueError) as error:
        if download:
            raise UserError(f"data.root={root}: {name} could not be fetched ({error})") from error
        raise UserError(
            f"data.root={root}: no {name} here as torchvision keeps it (data.download=true fetches)"
        ) from error
    if split == "unlabeled":
        return ArraySource(where=f"{name}/{split}", pixels=pixels, labels=None, classes=[])
    return ArraySource(where=f"{name}/{split}", pixels=pixels, labels=labels, classes=classes)


def _torchvision_files(name: str, root: str, *, split: str, download: bool) -> FileSource:
    """The files of a set that torchvision does not hold in memory."""
    kind, parts = _IN_FILES[name]
    paths: list[str] = []
    labels: list[int] = []
    classes: list[str] = []
    for part in parts if split == "train" else ("test",):
        if kind is OxfordIIITPet:  # takes no loader
            found = OxfordIIITPet(root, split=part, download=download)
            pairs = list(zip(map(os.fspath, found._images), found._labels, strict=True))
        else:  # the loader gives the path itself
            found = kind(root, split=part, download=download, loader=os.fspath)
            pairs = [found[i] for i in range(len(found))]
        paths += [os.path.relpath(path, root) for path, _ in pairs]
        labels += [int(label) for _, label in pairs]
        if classes not in ([], list(found.classes)):  # numbers would mean others
            raise UserError(f"data.root={root}: {name} has other classes in {part} than before")
        classes = list(found.classes)
    return FileSource(
        where=f"{name}/{split}",
        root=root,
        paths=StringTable.from_strings(paths),
        labels=np.array(labels, np.int64),
        classes=classes,
    )
