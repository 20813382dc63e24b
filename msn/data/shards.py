"""Tar shards in WebDataset's layout, with random access by byte offset; the index is cached.

A sample is a run of members whose names differ only in the extension: `cat/17.jpg`, `cat/17.cls`.
Its image is the member with an image extension (the shortest one, if there are several). If every
image has a `.cls` member, that holds the number of its class (-1: no label), and `classes.txt`
beside the shards names the classes, one per line (as a JSON string if a name does not fit in one
line). Otherwise the first folder of a member is its class, as in a folder of images.
"""

from __future__ import annotations

import json
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from msn.data.layout import UNLABELLED, labels_from_folders
from msn.data.sources import Source
from msn.data.tables import StringTable, Table, keep_table, kept_table, stamp
from msn.data.tar_members import NO_CLASS, ShardContents, read_shard
from msn.data.workers import open_files_limit
from msn.errors import UserError
from msn.files import TOO_MANY_OPEN
from msn.images.kinds import MOST_BYTES, BadImageError, unreadable
from msn.progress import Progress

log = logging.getLogger(__name__)

CLASSES_FILE = "classes.txt"
_MOST_OPEN = 256  # shards that a process keeps open; fewer where few files may be open
_THREADS = 16
_COMPRESSED = (".tar.gz", ".tgz")


class Members(NamedTuple):
    """Columns of a table with one row per image, and what holds for all."""

    shard: np.ndarray  # number of its shard
    offset: np.ndarray  # in bytes
    size: np.ndarray  # in bytes
    label: np.ndarray  # class number, UNLABELLED or NO_CLASS
    names: StringTable
    folders: StringTable  # the classes if folders are the classes; empty if `.cls` members are
    without_cls: int  # images without a `.cls` number


def find_shards(root: str, *, key: str) -> list[str]:
    """Sorted paths of the tar files below a folder, or the file `root` itself."""
    if os.path.isfile(root):
        return [root]
    if not os.path.isdir(root):
        gone = "there is no such folder or tar file"
        odd = "is a pipe, a socket or a device; it must be a tar file"
        raise UserError(f"{key}={root}: {odd if os.path.exists(root) else gone}")
    found = _tar_files(root)
    shards = [path for path in found if path.endswith(".tar")]
    if not shards and found:
        raise UserError(f"{key}={found[0]}: compressed shards cannot be read at random; unpack it")
    if not shards:
        raise UserError(f"{key}={root}: holds no shard (*.tar); `msn make_shards` makes them")
    if len(shards) < len(found):
        count = len(found) - len(shards)
        log.warning(
            "%s: %d compressed shards (%s) are skipped, they cannot be read at random",
            *(root, count, ", ".join(_COMPRESSED)),
        )
    return shards


def _tar_files(root: str) -> list[str]:
    """Sorted paths of all tar files below a folder, each once, whatever links lead to it."""
    seen = {os.path.realpath(root)}

    def is_new(path: str) -> bool:
        before = len(seen)
        seen.add(os.path.realpath(path))
        return len(seen) > before

    found: list[str] = []
    for folder, folders, names in os.walk(root, followlinks=True, onerror=_pass_over):
        folders[:] = [name for name in sorted(folders) if is_new(os.path.join(folder, name))]
        tars = [name for name in names if name.endswith((".tar", *_COMPRESSED))]
        paths = [os.path.join(folder, name) for name in sorted(tars) if not name.startswith(".")]
        found += [path for path in paths if is_new(path) and _is_file(path)]
    return sorted(found)


def _is_file(path: str) -> bool:
    """Whether it is a regular file; others, whose reading may never end, are logged."""
    if os.path.isfile(path):
        return True
    what = "a pipe, a socket or a device" if os.path.exists(path) else "a link to nothing"
    log.warning("%s: is %s and is skipped", path, what)
    return False


def _pass_over(error: OSError) -> None:
    log.warning("%s: cannot be listed (%s) and is skipped", error.filename, error.strerror)


def index_shards(root: str, shards: list[str]) -> Members:
    """The index of the shards, from the cache while none of them has changed.

    Args:
        root: the folder of the shards, or the only shard.
        shards: paths of tar files.

    Raises:
        UserError: one of them is not a tar file.
    """
    key, started = f"shards {os.path.realpath(root)}", time.time_ns()
    table = kept_table(key, shards)
    if table is not None:
        columns: dict[str, Any] = {**table.arrays, **table.strings}
        return Members(**columns, without_cls=table.facts["without_cls"])
    watched = {path: stamp(path) for path in shards}
    contents = _read_shards(root, shards)
    members = _members(contents)
    # An index with faults is not cached, so that they are reported at every start.
    if all(found.damage is None and not found.links for found in contents):
        arrays = {name: getattr(members, name) for name in ("shard", "offset", "size", "label")}
        strings = {"names": members.names, "folders": members.folders}
        table = Table(arrays, strings, {"without_cls": members.without_cls})
        keep_table(key, table, watched, started)
    return members


def _read_shards(root: str, shards: list[str]) -> list[ShardContents]:
    """Read the headers of all shards; report damaged shards and images that are skipped."""
    contents: list[ShardContents] = []
    images = 0
    with (
        Progress("indexing shards", total=len(shards)) as progress,
        ThreadPoolExecutor(_THREADS) as pool,
    ):
        for path, found in zip(shards, pool.map(read_shard, shards), strict=True):
            contents.append(found)
            images += len(found.images)
            progress.advance(title=f"indexing shards: {images} images")
            if found.damage is not None:
                log.warning("%s: is damaged from %s; what lies before is used", path, found.damage)
    links = sum(found.links for found in contents)
    if links:
        log.warning("%s: %d images are links to others and are skipped", root, links)
    further = sum(found.further for found in contents)
    if further:
        log.info(
            "%s: %d images share a sample with one of a shorter extension and are skipped",
            *(root, further),
        )
    return contents


def _members(contents: list[ShardContents]) -> Members:
    """One table of all images; if any class number is missing, folders are the classes."""
    rows = [(i, *image[:3]) for i, found in enumerate(contents) for image in found.images]
    names = [image.name for found in contents for image in found.images]
    table = np.array(rows, np.int64).reshape(-1, 4)
    shard, offset, size, label = (np.ascontiguousarray(column) for column in table.T)
    without_cls = int((label == NO_CLASS).sum())
    folders: list[str] = []
    if without_cls:
        label = np.full(len(names), NO_CLASS)
        order = sorted(range(len(names)), key=names.__getitem__)  # shards may be shuffled
        found_labels, folders = labels_from_folders([names[i] for i in order])
        if found_labels is not None:
            label[order] = found_labels
    texts = (StringTable.from_strings(names), StringTable.from_strings(folders))
    return Members(shard, offset, size, label, *texts, without_cls)


class _OpenShard:
    """An open shard; it closes when no thread uses it any more."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


@dataclass(eq=False, kw_only=True)
class ShardSource(Source):
    """Images inside uncompressed tar files, in the order of shards and members."""

    where: str
    shards: list[str]  # paths of the tar files
    members: Members
    labels: np.ndarray | None
    classes: list[str]
    why: str = (
        "data.use_labels=false, or not every image has a .cls number and their first folders are "
        "no classes, of which two are needed"
    )
    _open: dict[int, _OpenShard] = field(default_factory=dict, init=False)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.members.names)

    def name(self, i: int) -> str:
        """Name of image i in its shard."""
        return self.members.names[i]

    def identity(self, i: int) -> str:
        """Shard, its size and time of last change, and the byte offset of image i."""
        path = self.shards[int(self.members.shard[i])]
        return f"{os.path.realpath(path)} {stamp(path)} {int(self.members.offset[i])}"

    def read(self, i: int) -> bytes:
        """The bytes of image i."""
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
        """Open a shard on first use; above the limit close the one opened first."""
        opened = self._open.get(shard)
        if opened is not None:
            return opened
        if self._open and len(self._open) >= min(_MOST_OPEN, open_files_limit() // 8):
            for oldest in list(self._open)[:1]:  # empty if another thread was first
                self._open.pop(oldest, None)
        flags = os.O_RDONLY | os.O_NONBLOCK  # does not wait if the file is a pipe by now
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
        """State for another process, without the open files."""
        return {**self.__dict__, "_open": {}}


def shard_source(root: str, *, key: str, use_labels: bool) -> ShardSource:
    """Index tar shards.

    Args:
        root: a folder of `*.tar`, nested or flat, or one tar file.
        key: the setting it came from, for messages.
        use_labels: False leaves the images without labels.

    Raises:
        UserError: there is no shard, one is not a tar file or is compressed, or they hold no image.
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
    # As with folders, a class without an image is left out.
    used = np.unique(numbers[numbers != UNLABELLED])
    if len(used) < 2:
        return None, []
    labels = np.where(numbers == UNLABELLED, UNLABELLED, np.searchsorted(used, numbers))
    return labels, [listed[i] if listed else str(i) for i in used]


def class_line(name: str) -> str:
    """A line of `classes.txt`: the name, or a JSON string if the name does not fit in a line."""
    plain = name.isprintable() and name.strip() == name and name[:1] not in ("", '"')
    return name if plain else json.dumps(name)


def _listed_classes(root: str) -> list[str]:
    """The classes in `classes.txt`; [] if there is no such file.

    Raises:
        UserError: a line is empty, or two lines name the same class.
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
