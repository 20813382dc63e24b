"""Tar shards in WebDataset's layout, read at random: indexed once, then by byte offset.

A sample is a run of members that differ in their extension alone: `cat/17.jpg`, `cat/17.cls`. The
image is what has an image's extension, of several the shortest; `.cls`, where every image has one,
is the number of its class, -1 for none, and `classes.txt` beside the shards names the classes, a
line each (a name that is no line is a JSON string). Else the first folder of the members is the
class, as it is for a folder of images.
"""

from __future__ import annotations

import json
import logging
import os
from contextlib import suppress

import numpy as np

from msn.data.decode import MOST_BYTES, BadImageError, unreadable
from msn.data.folder_labels import UNLABELLED
from msn.data.shard_index import Members, find_shards, index_shards, stamp
from msn.data.sources import Source
from msn.data.tar_members import NO_CLASS
from msn.data.workers import TOO_MANY_OPEN, open_files_limit
from msn.errors import UserError

log = logging.getLogger(__name__)

CLASSES_FILE = "classes.txt"
_MOST_OPEN = 256  # shards that a process keeps open; fewer where few files may be open


class _OpenShard:
    """A shard that is open; it closes when nobody reads it any more, also in another thread."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


class ShardSource(Source):
    """Images inside uncompressed tar files, in the order of shards and members.

    Args:
        where: the folder or file, for messages.
        shards: paths of the tar files.
        members: one row an image.
        labels: class numbers, int64 [n], or None.
        classes: names of the classes.
    """

    why = (
        "data.use_labels=false, or not every image has a .cls number and their first folders are "
        "no classes, of which two are needed"
    )

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
        self._open: dict[int, _OpenShard] = {}

    def __len__(self) -> int:
        """Number of images."""
        return len(self.members.names)

    def name(self, i: int) -> str:
        """Name of image i in its shard."""
        return self.members.names[i]

    def identity(self, i: int) -> str:
        """Where the bytes of image i are, and size and time of last change of that shard."""
        path = self.shards[int(self.members.shard[i])]
        return f"{os.path.realpath(path)} {stamp(path)} {int(self.members.offset[i])}"

    def read(self, i: int) -> bytes:
        """The bytes of image i out of its shard."""
        shard = int(self.members.shard[i])
        size = int(self.members.size[i])
        if size > MOST_BYTES:
            raise BadImageError(f"{size} bytes: files above 1 GiB are not read")
        try:
            opened = self._opened(shard)
            data = os.pread(opened.descriptor, size, int(self.members.offset[i]))
        except OSError as error:
            raise unreadable(error, os.path.basename(self.shards[shard])) from error
        if len(data) < size:
            raise BadImageError(f"{os.path.basename(self.shards[shard])} ends before it")
        return data

    def _opened(self, shard: int) -> _OpenShard:
        """A shard, opened when it is first needed; the one that is open longest makes room."""
        opened = self._open.get(shard)
        if opened is not None:
            return opened
        if self._open and len(self._open) >= min(_MOST_OPEN, open_files_limit() // 8):
            for oldest in list(self._open)[:1]:  # none where another thread was first
                self._open.pop(oldest, None)
        flags = os.O_RDONLY | os.O_NONBLOCK  # what has become a pipe since is not waited for
        try:
            descriptor = os.open(self.shards[shard], flags)
        except OSError as error:
            if error.errno not in TOO_MANY_OPEN or not self._open:
                raise
            self._open.clear()
            descriptor = os.open(self.shards[shard], flags)
        opened = self._open[shard] = _OpenShard(descriptor)
        return opened

    def __getstate__(self) -> dict[str, object]:
        """Descriptors do not travel to other processes."""
        return {**self.__dict__, "_open": {}}


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
    members = index_shards(root, shards)
    if not len(members.names):
        raise UserError(f"{key}={root}: no image in {len(shards)} shards")
    labels, classes = _labels(root, members, key=key) if use_labels else (None, [])
    return ShardSource(where=root, shards=shards, members=members, labels=labels, classes=classes)


def _labels(root: str, members: Members, *, key: str) -> tuple[np.ndarray | None, list[str]]:
    numbers = np.asarray(members.label)
    if 0 < members.without_cls < len(numbers):
        instead = "their first folders are" if len(members.folders) else "there are no"
        log.warning(
            "%s: %d of %d images have no .cls number: %s classes",
            *(root, members.without_cls, len(numbers), instead),
        )
    if numbers[0] == NO_CLASS:
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
    # Classes without an image are left out, as they are where folders are the classes.
    used = np.unique(numbers[numbers != UNLABELLED])
    if len(used) < 2:
        return None, []
    labels = np.where(numbers == UNLABELLED, UNLABELLED, np.searchsorted(used, numbers))
    return labels, [listed[i] if listed else str(i) for i in used]


def class_line(name: str) -> str:
    """A class in `classes.txt`: as it is, or as a JSON string where a line cannot hold it so."""
    plain = name.isprintable() and name.strip() == name and name[:1] not in ("", '"')
    return name if plain else json.dumps(name)


def _listed_classes(root: str) -> list[str]:
    """The classes that `classes.txt` names, none where there is no such file.

    Raises:
        UserError: a line is empty, so that it is not clear what the next ones number, or two lines
            name the same class.
    """
    folder = root if os.path.isdir(root) else os.path.dirname(os.path.abspath(root))
    path = os.path.join(folder, CLASSES_FILE)
    if not os.path.isfile(path):
        return []
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        names = [_class_name(line.strip()) for line in file.read().rstrip().split("\n")]
    first: dict[str, int] = {}
    for number, name in enumerate(names, 1):
        if name is None:
            raise UserError(f"{path}: line {number} is empty; each line names a class, from 0 on")
        if name in first:
            raise UserError(f"{path}: lines {first[name]} and {number} both name {ascii(name)}")
        first[name] = number
    return list(first)


def _class_name(line: str) -> str | None:
    if line.startswith('"'):
        with suppress(ValueError):
            return str(json.loads(line))
    return line or None
