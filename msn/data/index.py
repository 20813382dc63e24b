"""An index of the image files below a folder: built in parallel, kept between runs."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from typing import NamedTuple

import numpy as np

from msn.data.kinds import SUFFIXES, UNREAD_SUFFIXES
from msn.data.progress import progress_bar
from msn.data.tables import SETTLED_NS, StringTable, cache_file, load_arrays, store_arrays

log = logging.getLogger(__name__)

_THREADS = 16
_CACHE_FROM = 10_000  # images; smaller folders are read again faster than a cache is worth


def scan_folder(root: str, cache_from: int = _CACHE_FROM) -> StringTable:
    """Find every image file below a folder, in the order of their relative paths.

    Hidden files and folders are passed over, links to folders are followed. The result for a large
    folder is kept in the user's cache and used again while no folder in it has changed.

    Args:
        root: an existing folder.
        cache_from: number of images from which on the result is kept.

    Returns:
        Paths relative to `root` with `/` between their parts, sorted. Folders below the root that
        cannot be listed are passed over with a warning.

    Raises:
        OSError: the root cannot be listed.
    """
    root = os.path.realpath(root)
    cached = _load_cached(root)
    if cached is not None:
        return cached
    started = time.time_ns()
    paths, folders, closed, unread = _walk(root)
    if closed:
        more = f" and {len(closed) - 1} more" if len(closed) > 1 else ""
        log.warning("%s: passed over what cannot be listed: %s%s", root, closed[0], more)
    _say_unread(root, unread)
    table = StringTable.from_strings(sorted(paths))
    if len(table) >= cache_from:
        settled = all(stamp < started - SETTLED_NS for stamp in folders.values())
        if settled and not closed:  # else they would stay away when they can be listed again
            _store_cached(root, table, folders, unread)
        log.info("found %d images below %s in %.1f s", len(table), root, _since(started))
    return table


def _say_unread(root: str, unread: Mapping[str, int]) -> None:
    if unread:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(unread.items()))
        log.warning("%s: passed over images of kinds that are not read: %s", root, kinds)


def _since(started: int) -> float:
    return (time.time_ns() - started) / 1e9


class _Tree(NamedTuple):
    """Relative image paths, folders with change times in ns, what cannot be listed and why, and
    how many images there are of each kind that is not read.
    """

    paths: list[str]
    folders: dict[str, int]
    closed: list[str]
    unread: Counter[str]


def _walk(root: str) -> _Tree:
    """Read the tree with many threads."""
    paths: list[str] = []
    folders: dict[str, int] = {}
    closed: list[str] = []
    unread: Counter[str] = Counter()
    with progress_bar("looking for images") as advance, ThreadPoolExecutor(_THREADS) as pool:
        pending = {pool.submit(_list_folder, root, "", frozenset())}
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                found = future.result()
                folders[found.folder] = found.stamp
                paths += found.files
                closed += found.closed
                unread += found.unread
                pending |= {pool.submit(_list_folder, root, f, found.above) for f in found.inner}
            advance(f"looking for images: {len(paths)} in {len(folders)} folders")
    return _Tree(paths, folders, sorted(closed), unread)


class _Listing(NamedTuple):
    """One folder: its change time in ns, images, folders in it, those above, see also `_Tree`."""

    folder: str
    stamp: int
    files: list[str]
    inner: list[str]
    above: frozenset[tuple[int, int]]
    closed: list[str]
    unread: Counter[str]


def _list_folder(root: str, folder: str, above: frozenset[tuple[int, int]]) -> _Listing:
    """List one folder; one below the root that cannot be listed is closed and empty."""
    try:
        return _read_folder(root, folder, above)
    except OSError as error:
        if not folder:
            raise
        return _Listing(folder, 0, [], [], above, [_closed(folder, error)], Counter())


def _closed(folder: str, error: OSError) -> str:
    return f"{folder} ({error.strerror or type(error).__name__})"


def _read_folder(root: str, folder: str, above: frozenset[tuple[int, int]]) -> _Listing:
    absolute = os.path.join(root, folder)
    status = os.stat(absolute)
    identity = (status.st_dev, status.st_ino)
    found = _Listing(folder, status.st_mtime_ns, [], [], above | {identity}, [], Counter())
    if identity in above:  # a link back up the tree would otherwise never end
        return found
    prefix = f"{folder}/" if folder else ""
    with os.scandir(absolute) as entries:
        for entry in entries:
            name = entry.name
            if name.startswith(".") or name == "__MACOSX":
                continue
            try:
                is_folder = entry.is_dir()
            except OSError as error:  # a link to itself, or to behind a folder that is closed
                is_folder = False
                if not name.lower().endswith(SUFFIXES):
                    found.closed.append(_closed(prefix + name, error))
                    continue
            if is_folder:
                found.inner.append(prefix + name)
            elif name.lower().endswith(SUFFIXES):
                found.files.append(prefix + name)
            elif name.lower().endswith(UNREAD_SUFFIXES):
                found.unread[os.path.splitext(name)[1].lower()] += 1
    return found


def _store_cached(
    root: str, table: StringTable, folders: dict[str, int], unread: Mapping[str, int]
) -> None:
    names = StringTable.from_strings(folders)
    arrays = {
        "data": table.data,
        "offsets": table.offsets,
        "folder_data": names.data,
        "folder_offsets": names.offsets,
        "folder_stamps": np.fromiter(folders.values(), np.int64),
    }
    store_arrays(cache_file(root), {"root": root, "unread": dict(unread)}, arrays)


def _load_cached(root: str) -> StringTable | None:
    """The stored table, unless a folder was added, removed or changed since.

    Adding, removing or renaming a file changes its folder's time, so only folders are looked at.
    """
    loaded = load_arrays(cache_file(root))
    if loaded is None or loaded[0]["root"] != root:
        return None
    arrays = loaded[1]
    folders = StringTable(arrays["folder_data"], arrays["folder_offsets"])
    try:
        for folder, stamp in zip(folders, arrays["folder_stamps"], strict=True):
            if os.stat(os.path.join(root, folder)).st_mtime_ns != stamp:
                return None
    except OSError:
        return None
    _say_unread(root, loaded[0]["unread"])
    return StringTable(arrays["data"], arrays["offsets"])
