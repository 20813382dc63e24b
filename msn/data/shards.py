"""Tar shards in WebDataset's layout, read at random: indexed once, then by byte offset.

A sample is a run of members that differ in their extension alone: `cat/17.jpg`, `cat/17.cls`. The
image is what has an image's extension; `.cls`, where every image has one, is the number of its
class, and `classes.txt` beside the shards names the classes, a line each. Without `.cls` the first
folder of the members is the class, as it is for a folder of images.
"""

from __future__ import annotations

import logging
import os
import tarfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from msn.data.decode import SUFFIXES, BadImageError, DecodedImage, decode
from msn.data.index import (
    SETTLED_NS,
    StringTable,
    cache_file,
    load_arrays,
    progress_bar,
    store_arrays,
)
from msn.data.sources import Source, labels_from_folders
from msn.errors import UserError

log = logging.getLogger(__name__)

CLASSES_FILE = "classes.txt"
_THREADS = 16
_MOST_OPEN = 256  # shards that a process keeps open
_NO_CLASS = -1
_COLUMNS = ("shard", "offset", "size", "label")
_TEXTS = ("names", "folders")


class ShardSource(Source):
    """Images inside uncompressed tar files, in the order of shards and members.

    Args:
        where: the folder or file, for messages.
        shards: paths of the tar files.
        members: one row an image.
        labels: class numbers, int64 [n], or None.
        classes: names of the classes.
    """

    def __init__(
        self,
        *,
        where: str,
        shards: list[str],
        members: Members,
        labels: np.ndarray | None,
        classes: list[str],
    ) -> None:
        self.where, self.shards, self.members = where, shards, members
        self.labels, self.classes = labels, classes
        self._open: dict[int, int] = {}
        self._process = os.getpid()

    def __len__(self) -> int:
        """Number of images."""
        return len(self.members.names)

    def name(self, i: int) -> str:
        """Name of image i in its shard."""
        return self.members.names[i]

    def identity(self, i: int) -> str:
        """Where the bytes of image i are, and size and time of last change of that shard."""
        path = self.shards[int(self.members.shard[i])]
        return f"{os.path.realpath(path)} {_stamp(path)} {int(self.members.offset[i])}"

    def decode(self, i: int, allowed_reduction: Callable[[int, int], int]) -> DecodedImage:
        """Read the bytes of image i out of its shard and decode them."""
        shard = int(self.members.shard[i])
        size = int(self.members.size[i])
        try:
            data = os.pread(self._descriptor(shard), size, int(self.members.offset[i]))
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise BadImageError(f"{os.path.basename(self.shards[shard])}: {reason}") from error
        if len(data) < size:
            raise BadImageError(f"{os.path.basename(self.shards[shard])} ends before it")
        return decode(data, allowed_reduction)

    def _descriptor(self, shard: int) -> int:
        """A file descriptor of a shard, opened by this process."""
        if self._process != os.getpid():  # forked: what the parent opened is the parent's to close
            self._open, self._process = {}, os.getpid()
        if shard not in self._open:
            if len(self._open) >= _MOST_OPEN:
                os.close(self._open.pop(next(iter(self._open))))
            self._open[shard] = os.open(self.shards[shard], os.O_RDONLY)
        return self._open[shard]

    def __getstate__(self) -> dict[str, object]:
        """Descriptors do not travel to other processes."""
        return {**self.__dict__, "_open": {}}


class Members(NamedTuple):
    """Where each image lies: shard number, byte offset, bytes, class number or -1, name.

    `folders` names the classes where these are the members' folders; it is empty where the numbers
    were in `.cls` members.
    """

    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    label: np.ndarray
    names: StringTable
    folders: StringTable


def shard_source(root: str, *, key: str, use_labels: bool) -> ShardSource:
    """Index tar shards.

    Args:
        root: a folder of `*.tar`, nested or flat, or one tar file.
        key: the setting it came from, for messages.
        use_labels: False leaves the images without labels.

    Raises:
        UserError: there is no shard, one is no tar file or compressed, or they hold no image.
    """
    shards = find_shards(root, key=key)
    members = _index(root, shards)
    if not len(members.names):
        raise UserError(f"{key}={root}: no image in {len(shards)} shards")
    labels, classes = _labels(root, members, key=key) if use_labels else (None, [])
    return ShardSource(where=root, shards=shards, members=members, labels=labels, classes=classes)


def find_shards(root: str, *, key: str) -> list[str]:
    """Sorted paths of the tar files below a folder, or the one that `root` is."""
    if os.path.isfile(root):
        return [root]
    if not os.path.isdir(root):
        raise UserError(f"{key}={root}: there is no such folder or tar file")
    found = [
        os.path.join(folder, name)
        for folder, _, names in os.walk(root, followlinks=True)
        for name in names
        if name.endswith((".tar", ".tar.gz", ".tgz")) and not name.startswith(".")
    ]
    shards = sorted(path for path in found if path.endswith(".tar"))
    if not shards and found:
        raise UserError(f"{key}={found[0]}: compressed shards cannot be read at random; unpack it")
    if not shards:
        raise UserError(f"{key}={root}: holds no shard (*.tar); `msn make_shards` makes them")
    return shards


def _index(root: str, shards: list[str]) -> Members:
    """The index of the shards, from the cache while none of them has changed."""
    started = time.time_ns()
    stamps = np.array([_stamp(path) for path in shards], np.int64).reshape(-1, 2)
    file = cache_file(f"shards {os.path.realpath(root)}")
    table = StringTable.from_strings(shards)
    loaded = load_arrays(file)
    if loaded is not None:
        arrays = loaded[1]
        same = np.array_equal(arrays["shards"], table.data)
        if same and np.array_equal(arrays["stamps"].reshape(-1, 2), stamps):
            shard, offset, size, label = (arrays[f] for f in _COLUMNS)
            texts = [StringTable(arrays[f], arrays[f"{f}_offsets"]) for f in _TEXTS]
            return Members(shard, offset, size, label, *texts)
    members = _read_shards(shards)
    if (stamps[:, 1] < started - SETTLED_NS).all():
        arrays = {name: getattr(members, name) for name in _COLUMNS}
        for name in _TEXTS:
            text = getattr(members, name)
            arrays |= {name: text.data, f"{name}_offsets": text.offsets}
        arrays |= {"shards": table.data, "stamps": stamps.ravel()}
        store_arrays(file, {"root": os.path.realpath(root)}, arrays)
    return members


def _stamp(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def _read_shards(shards: list[str]) -> Members:
    rows: list[tuple[int, int, int, int]] = []
    names: list[str] = []
    with (
        progress_bar("indexing shards", total=len(shards)) as advance,
        ThreadPoolExecutor(_THREADS) as pool,
    ):
        for number, found in enumerate(pool.map(_read_shard, shards)):
            rows += [(number, offset, size, label) for offset, size, label, _ in found]
            names += [name for *_, name in found]
            advance(f"indexing shards: {len(names)} images")
    table = np.array(rows, np.int64).reshape(-1, 4)
    shard, offset, size, label = (np.ascontiguousarray(column) for column in table.T)
    folders: list[str] = []
    if (label == _NO_CLASS).any():
        label = np.full(len(names), _NO_CLASS)
        order = sorted(range(len(names)), key=names.__getitem__)  # shards may be shuffled
        found_labels, folders = labels_from_folders([names[i] for i in order])
        if found_labels is not None:
            label[order] = found_labels
    texts = (StringTable.from_strings(names), StringTable.from_strings(folders))
    return Members(shard, offset, size, label, *texts)


def _read_shard(path: str) -> list[tuple[int, int, int, str]]:
    """Offset, size, label and name of every image of one shard."""
    images: dict[str, tuple[int, int, str]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            try:
                for member in tar:
                    folder, slash, file = member.name.removeprefix("./").rpartition("/")
                    if not member.isreg() or file.startswith("."):
                        continue
                    stem, _, extension = file.partition(".")
                    sample = folder + slash + stem
                    if extension == "cls":
                        labels[sample] = _read_label(tar, member)
                    elif f".{extension}".lower().endswith(SUFFIXES):
                        name = folder + slash + file
                        images[sample] = (member.offset_data, member.size, name)
            except tarfile.ReadError as error:
                log.warning("%s: is damaged (%s); what lies before is used", path, error)
    except tarfile.TarError as error:
        raise UserError(f"{path}: is no uncompressed tar file ({error})") from None
    return [(*image[:2], labels.get(s, _NO_CLASS), image[2]) for s, image in images.items()]


def _read_label(tar: tarfile.TarFile, member: tarfile.TarInfo) -> int:
    file = tar.extractfile(member)
    text = file.read(32) if file is not None else b""
    return int(text) if text.strip().isdigit() else _NO_CLASS


def _labels(root: str, members: Members, *, key: str) -> tuple[np.ndarray | None, list[str]]:
    numbers = np.asarray(members.label)
    if numbers[0] == _NO_CLASS:
        return None, []
    if len(members.folders):
        return numbers, list(members.folders)
    listed = _listed_classes(root)
    count = int(numbers.max()) + 1
    if listed and len(listed) < count:
        raise UserError(
            f"{key}={root}: {CLASSES_FILE} names {len(listed)} classes, a shard has number "
            f"{count - 1}"
        )
    names = listed or [str(number) for number in range(count)]
    # Classes without an image are left out, as they are where folders are the classes.
    used = np.unique(numbers)
    if len(used) < 2:
        return None, []
    return np.searchsorted(used, numbers), [names[i] for i in used]


def _listed_classes(root: str) -> list[str]:
    folder = root if os.path.isdir(root) else os.path.dirname(os.path.abspath(root))
    try:
        with open(
            os.path.join(folder, CLASSES_FILE), encoding="utf-8-sig", errors="surrogateescape"
        ) as file:
            return [line.strip() for line in file if line.strip()]
    except OSError:
        return []
