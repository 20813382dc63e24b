"""Where images come from: files below folders or in lists, and arrays in memory.

A source is a numbered collection of images with names, and labels where it has any. It decodes an
image or says why it cannot; what happens then is decided elsewhere.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from msn.data.decode import BadImageError, DecodedImage, decode, full_size
from msn.data.index import scan_folder
from msn.data.list_index import index_list
from msn.data.tables import StringTable
from msn.errors import UserError


class Source(ABC):
    """A numbered collection of images.

    Attributes:
        where: what a message calls it, for instance the folder.
        labels: class numbers, int64 [n], or None.
        classes: names of the classes, empty without labels.
    """

    where: str
    labels: np.ndarray | None
    classes: list[str]

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, i: int) -> str:
        """Name of image i, for instance its path relative to the root."""

    def identity(self, i: int) -> str:
        """Changes when image i is another image: what may be kept under it is kept under this."""
        return f"{os.path.realpath(self.where)}/{self.name(i)}"

    @abstractmethod
    def decode(self, i: int, allowed_reduction: Callable[[int, int], int]) -> DecodedImage:
        """Decode image i.

        Raises:
            BadImageError: it cannot be read.
        """

    def rgb(self, i: int) -> Image.Image:
        """Image i at its full size."""
        return Image.fromarray(self.decode(i, full_size).pixels)


class FileSource(Source):
    """Image files, by paths relative to a root."""

    def __init__(
        self,
        *,
        where: str,
        root: str,
        paths: StringTable,
        labels: np.ndarray | None,
        classes: list[str],
    ) -> None:
        self.where, self.root, self.paths = where, root, paths
        self.labels, self.classes = labels, classes

    def __len__(self) -> int:
        """Number of files."""
        return len(self.paths)

    def name(self, i: int) -> str:
        """Path of image i relative to the root."""
        return self.paths[i]

    def path(self, i: int) -> str:
        """Where file i is."""
        return os.path.normpath(os.path.join(self.root, self.paths[i]))

    def identity(self, i: int) -> str:
        """Where file i is, its size and the time of its last change."""
        path = os.path.join(self.root, self.paths[i])
        try:
            status = os.stat(path)
        except OSError:
            return f"{os.path.realpath(path)} missing"
        return f"{os.path.realpath(path)} {status.st_size} {status.st_mtime_ns}"

    def decode(self, i: int, allowed_reduction: Callable[[int, int], int]) -> DecodedImage:
        """Read and decode file i."""
        try:
            with open(os.path.join(self.root, self.paths[i]), "rb") as file:
                data = file.read()
        except OSError as error:
            raise BadImageError(error.strerror or type(error).__name__) from error
        return decode(data, allowed_reduction)


class ArraySource(Source):
    """Images of one size in memory, uint8 [n, H, W, 3]."""

    def __init__(
        self, *, where: str, pixels: np.ndarray, labels: np.ndarray | None, classes: list[str]
    ) -> None:
        self.where, self.pixels, self.labels, self.classes = where, pixels, labels, classes

    def __len__(self) -> int:
        """Number of images."""
        return len(self.pixels)

    def name(self, i: int) -> str:
        """Where the image is, with its number."""
        return f"{self.where}[{i}]"

    def identity(self, i: int) -> str:
        """Name and pixels."""
        pixels = np.ascontiguousarray(self.pixels[i])
        return f"{self.name(i)} {hashlib.sha256(pixels.tobytes()).hexdigest()}"

    def decode(self, i: int, allowed_reduction: Callable[[int, int], int]) -> DecodedImage:
        """Look image i up; nothing is left to decode."""
        pixels = self.pixels[i]
        return DecodedImage(pixels, pixels.shape[0], pixels.shape[1], 1)


def folder_source(root: str, *, key: str, use_labels: bool) -> FileSource:
    """Index a folder of images, nested or flat.

    Images get labels when each lies in a subfolder and there are at least two of these: the first
    part of the relative path is the class.

    Args:
        root: the folder.
        key: the setting it came from, for messages.
        use_labels: False leaves the images without labels whatever their folders are called.

    Raises:
        UserError: the folder is missing, not a folder, unreadable, or holds no image.
    """
    check_folder(root, key=key)
    try:
        paths = scan_folder(root)
    except OSError as error:
        raise UserError(f"{key}={root}: cannot be read ({error.strerror})") from error
    if not len(paths):
        empty = not any(os.scandir(root))
        what = "is an empty folder" if empty else "holds no image (JPEG, PNG, WebP, BMP or TIFF)"
        raise UserError(f"{key}={root}: {what}")
    labels, classes = labels_from_folders(paths) if use_labels else (None, [])
    return FileSource(where=root, root=root, paths=paths, labels=labels, classes=classes)


def check_folder(root: str, *, key: str) -> None:
    """Raise a UserError unless `root` is an existing folder."""
    if not os.path.exists(root):
        raise UserError(f"{key}={root}: there is no such folder")
    if not os.path.isdir(root):
        raise UserError(f"{key}={root}: is a file, must be a folder")


def labels_from_folders(paths: Sequence[str]) -> tuple[np.ndarray | None, list[str]]:
    """Read labels off sorted relative paths: the first folder of each is its class.

    Returns:
        Labels int64 [n] and class names; None and [] if one lies outside any folder, or all in one.
    """
    classes: dict[str, int] = {}
    labels = np.empty(len(paths), np.int64)
    begin = 0
    while begin < len(paths):
        folder, slash, _ = paths[begin].partition("/")
        if not slash:
            return None, []
        end = _end_of_run(paths, begin, folder + slash)
        labels[begin:end] = classes.setdefault(folder, len(classes))
        begin = end
    return (labels, list(classes)) if len(classes) > 1 else (None, [])


def _end_of_run(paths: Sequence[str], begin: int, prefix: str) -> int:
    """One past the last of the paths from `begin` on that start alike; they are sorted."""
    step = 1
    while begin + step < len(paths) and paths[begin + step].startswith(prefix):
        step *= 2
    low, high = begin + step // 2, min(begin + step, len(paths))  # low starts so, high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if paths[middle].startswith(prefix) else (low, middle)
    return high


def list_source(file: str, *, key: str, root: str | None, use_labels: bool) -> FileSource:
    """Read a list of image paths: a text file with a path a line, or CSV (see `index_list`).

    Args:
        file: the list.
        key: the setting it came from, for messages.
        root: what relative paths start from; None takes the list's own folder.
        use_labels: False ignores the labels.

    Raises:
        UserError: the list is missing, damaged or empty, has labels for some images only, or two
            for one image.
    """
    base = root if root is not None else os.path.dirname(os.path.abspath(file))
    paths, labels, classes = index_list(file, key=key, base=base, use_labels=use_labels)
    return FileSource(where=file, root=base, paths=paths, labels=labels, classes=classes)
