"""Which tar shards there are and where in them the images lie; kept in a cache."""

from __future__ import annotations

import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from msn.data.folder_labels import labels_from_folders
from msn.data.tables import SETTLED_NS, StringTable, cache_file, load_arrays, store_arrays
from msn.data.tar_members import NO_CLASS, ShardContents, read_shard
from msn.errors import UserError
from msn.progress import Progress

log = logging.getLogger(__name__)

_THREADS = 16
_COLUMNS = ("shard", "offset", "size", "label")
_TEXTS = ("names", "folders")
_COMPRESSED = (".tar.gz", ".tgz")


class Members(NamedTuple):
    """Where each image lies: shard number, byte offset, bytes, class number or -1, name.

    `folders` names the classes where these are the members' folders; it is empty where the numbers
    were in `.cls` members. `without_cls` counts the images that have no such number.
    """

    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    label: np.ndarray
    names: StringTable
    folders: StringTable
    without_cls: int


def find_shards(root: str, *, key: str) -> list[str]:
    """Sorted paths of the tar files below a folder, or the one that `root` is."""
    if os.path.isfile(root):
        return [root]
    if not os.path.isdir(root):
        gone = "there is no such folder or tar file"
        odd = "is a pipe, a socket or a device, must be a tar file"
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
            "%s: %d compressed shards (%s) are passed over, they cannot be read at random",
            *(root, count, ", ".join(_COMPRESSED)),
        )
    return shards


def _tar_files(root: str) -> list[str]:
    """Sorted paths of all tar files below a folder, each file and folder by one of its paths."""
    seen = {os.path.realpath(root)}  # links may lead up the tree, or to what is here anyway

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
    """Whether it is a regular file; a pipe would be waited for, a device never ends."""
    if os.path.isfile(path):
        return True
    if os.path.exists(path):
        log.warning("%s: is a pipe, a socket or a device and is passed over", path)
    else:
        log.warning("%s: is a link to nothing and is passed over", path)
    return False


def _pass_over(error: OSError) -> None:
    log.warning("%s: cannot be listed (%s) and is passed over", error.filename, error.strerror)


def index_shards(root: str, shards: list[str]) -> Members:
    """The index of the shards, from the cache while none of them has changed.

    Args:
        root: what was searched for them, or the one shard.
        shards: paths of tar files.

    Raises:
        UserError: one of them is no tar file.
    """
    started = time.time_ns()
    stamps = np.array([stamp(path) for path in shards], np.int64).reshape(-1, 2)
    file = cache_file(f"shards {os.path.realpath(root)}")
    table = StringTable.from_strings(shards)
    loaded = load_arrays(file)
    if loaded is not None:
        arrays = loaded[1]
        same = np.array_equal(arrays["shards"], table.data)
        if same and np.array_equal(arrays["stamps"].reshape(-1, 2), stamps):
            shard, offset, size, label = (arrays[f] for f in _COLUMNS)
            names, folders = (StringTable(arrays[f], arrays[f"{f}_offsets"]) for f in _TEXTS)
            without_cls = int(arrays["without_cls"][0])
            return Members(shard, offset, size, label, names, folders, without_cls)
    contents = _read_shards(root, shards)
    members = _members(contents)
    # Else it is said at every start.
    whole = all(found.damage is None and not found.links for found in contents)
    if whole and (stamps[:, 1] < started - SETTLED_NS).all():
        arrays = {name: getattr(members, name) for name in _COLUMNS}
        for name in _TEXTS:
            text = getattr(members, name)
            arrays |= {name: text.data, f"{name}_offsets": text.offsets}
        arrays |= {"shards": table.data, "stamps": stamps.ravel()}
        arrays["without_cls"] = np.array([members.without_cls])
        store_arrays(file, {"root": os.path.realpath(root)}, arrays)
    return members


def stamp(path: str) -> tuple[int, int]:
    """Size in bytes and time of the last change in ns."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def _read_shards(root: str, shards: list[str]) -> list[ShardContents]:
    """What each shard holds; says which are damaged, and how many images are not taken."""
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
        log.warning("%s: %d images are links to others and are passed over", root, links)
    further = sum(found.further for found in contents)
    if further:
        log.info(
            "%s: %d images share a sample with one of a shorter extension and are passed over",
            *(root, further),
        )
    return contents


def _members(contents: list[ShardContents]) -> Members:
    """One table of all shards' images, with classes from the folders where a number is missing."""
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
