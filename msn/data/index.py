"""The index of the image files below a folder: built in parallel, kept between runs.

Two names of one file are one image. Only links are resolved; a folder's listing says which of its
entries are links.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import field
from typing import Any, NamedTuple

import numpy as np

from msn.data.tables import KEEP_FROM, Stamp, StringTable, Table, keep_table, kept_table, stamp
from msn.images.kinds import SUFFIXES, UNREAD_SUFFIXES
from msn.progress import Progress

log = logging.getLogger(__name__)

_THREADS = 16
_MOST_LINKS = 40  # to a file, one after the other, as in the kernel
# Files and folders that operating systems, network drives and notebooks put beside images, in
# lower case.
_SYSTEM = frozenset(
    {
        *("@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "@tmp", "~snapshot"),
        *("$recycle.bin", "recycler", "system volume information", "config.msi"),
        *("thumbs", "thumbs.db", "ehthumbs.db", "desktop.ini"),
        *("__macosx", "network trash folder", "temporary items"),
        *("__pycache__", ".ipynb_checkpoints", "lost+found"),
        *(f"found.{i:03}" for i in range(1000)),  # what Windows saves of a damaged disk
    }
)


class FoundImages(NamedTuple):
    """Sorted relative paths, and whether links to files or folders lead to some of them."""

    paths: StringTable
    linked: bool


def scan_folder(root: str, cache_from: int = KEEP_FROM) -> FoundImages:
    """Find every image file below a folder, in the order of their relative paths.

    Hidden files and folders and those that systems make for themselves are skipped. Links are
    followed; of several names of one file or folder the one without a link counts, else the first.
    The result for a large folder is cached and used again while no folder in it has changed.

    Args:
        root: an existing folder.
        cache_from: number of images from which on the result is cached.

    Returns:
        Paths relative to `root` with `/` between their parts. Folders below the root that cannot be
        listed, and files that are not regular, are skipped with a warning.

    Raises:
        OSError: the root cannot be listed.
    """
    root = os.path.realpath(root)
    key = f"folder {root}"
    table = kept_table(key)
    if table is not None:
        _say(root, table.facts["notes"])
        return FoundImages(table.strings["paths"], table.facts["linked"])
    started = time.time_ns()
    tree = _walk(root)
    repeated = tree.repeated + _repeated_files(root, tree)
    gone = set(repeated)
    paths = StringTable.from_strings(sorted(path for path in tree.paths if path not in gone))
    notes = _notes(tree, sorted(repeated))
    _say(root, notes)
    if len(paths) >= cache_from:
        if not tree.closed:  # else they stay away when they can be listed again
            table = Table({}, {"paths": paths}, {"linked": tree.linked, "notes": notes})
            watched = {os.path.join(root, folder): at for folder, at in tree.folders.items()}
            keep_table(key, table, watched, started)
        log.info("found %d images below %s in %.1f s", len(paths), root, _since(started))
    return FoundImages(paths, tree.linked)


def system_name(name: str) -> str | None:
    """Name in messages of a system's own or a hidden file or folder; None for all others."""
    if name.casefold() in _SYSTEM:
        return name
    if name.startswith("._"):  # beside every file that a Mac puts on a foreign disk or into a zip
        return "._*"
    return "hidden" if name.startswith(".") else None


class _Note(NamedTuple):
    """A message about a folder that each start logs, also when its index is in the cache."""

    level: int
    text: str


def _notes(tree: _Tree, repeated: list[str]) -> list[_Note]:
    notes = []
    for what, names in (("cannot be listed", tree.closed), ("is not a regular file", tree.special)):
        if names:
            notes.append(_Note(logging.WARNING, f"skipped what {what}: {_some(sorted(names), 1)}"))
    if tree.unread:
        kinds = _counts(tree.unread)
        notes.append(_Note(logging.WARNING, f"skipped images of kinds that are not read: {kinds}"))
    if repeated:
        which = "name that leads" if len(repeated) == 1 else "names that lead"
        text = f"skipped {len(repeated)} {which} by links to what is there under another"
        notes.append(_Note(logging.WARNING, f"{text}: {_some(repeated, 3)}"))
    if tree.system:
        text = f"skipped system and hidden files and folders: {_counts(tree.system)}"
        notes.append(_Note(logging.INFO, text))
    return notes


def _say(root: str, notes: Sequence[Sequence[Any]]) -> None:
    for level, text in notes:
        log.log(level, "%s: %s", root, text)


def _some(names: Sequence[str], count: int) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def _counts(counter: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counter.items()))


def _since(started: int) -> float:
    return (time.time_ns() - started) / 1e9


@dataclasses.dataclass
class _Listing:
    """Contents of one folder, or of a tree. Paths are relative to the root, real ones absolute."""

    paths: list[str] = field(default_factory=list)
    folders: dict[str, Stamp] = field(default_factory=dict)  # that were listed, with their stamps
    inner: dict[str, str] = field(default_factory=dict)  # folders in them: real paths
    links: dict[str, str] = field(default_factory=dict)  # to folders not yet listed: real paths
    linked_files: list[str] = field(default_factory=list)  # those of the paths that are links
    closed: list[str] = field(default_factory=list)  # what cannot be listed, and why
    special: list[str] = field(default_factory=list)  # pipes, sockets, devices
    unread: Counter[str] = field(default_factory=Counter)  # images of kinds that are not read
    system: Counter[str] = field(default_factory=Counter)  # what `system_name` names


@dataclasses.dataclass
class _Tree(_Listing):
    """All that lies below a root."""

    real: set[str] = field(default_factory=set)  # real paths of all folders
    repeated: list[str] = field(default_factory=list)  # paths that are there by another name
    linked: bool = False

    def add(self, found: _Listing) -> dict[str, str]:
        """Add a listing; returns the folders in it that are not listed yet."""
        for name in ("paths", "linked_files", "closed", "special"):
            getattr(self, name).extend(getattr(found, name))
        for name in ("folders", "links", "unread", "system"):  # counters add up
            getattr(self, name).update(getattr(found, name))
        new = {path: real for path, real in found.inner.items() if real not in self.real}
        self.repeated += found.inner.keys() - new.keys()
        self.real |= set(new.values())
        return new


def _walk(root: str) -> _Tree:
    """Read the tree with many threads: first its folders, then, round by round, its links."""
    tree = _Tree()
    with Progress("looking for images") as progress, ThreadPoolExecutor(_THREADS) as pool:
        begin = {"": root}
        while begin:
            tree.real |= set(begin.values())
            pending = {pool.submit(_list_folder, *folder) for folder in begin.items()}
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    inner = tree.add(future.result())
                    pending |= {pool.submit(_list_folder, *folder) for folder in inner.items()}
                progress.advance(
                    title=f"looking for images: {len(tree.paths)} in {len(tree.folders)} folders"
                )
            begin = _next_links(tree)
    return tree


def _next_links(tree: _Tree) -> dict[str, str]:
    """The links to follow next: one to each folder, and none into what another leads to.

    So which name counts does not depend on which thread was first, and a loop ends.
    """
    first: dict[str, str] = {}
    for path, real in sorted(tree.links.items()):
        if real in tree.real or first.setdefault(real, path) != path:
            tree.repeated.append(path)
    later = {real for real in first if any(above in first for above in _above(real))}
    tree.links = {path: real for real, path in first.items() if real in later}
    tree.linked = tree.linked or bool(first)
    return {path: real for real, path in first.items() if real not in later}


def _above(folder: str) -> Iterator[str]:
    while (parent := os.path.dirname(folder)) != folder:
        yield parent
        folder = parent


def _repeated_files(root: str, tree: _Tree) -> list[str]:
    """Links to files that are there under another name, which is not a link, or an earlier link."""
    seen: set[str] = set()
    folders: dict[str, str] = {}
    repeated = []
    for path in sorted(tree.linked_files):
        real = follow(os.path.join(root, path), folders)
        folder, name = os.path.split(real)
        found = folder in tree.real and system_name(name) is None and _is_image(name)
        if real in seen or (found and os.path.isfile(real)):
            repeated.append(path)
        seen.add(real)
    tree.linked = tree.linked or len(repeated) < len(tree.linked_files)
    return repeated


def _list_folder(folder: str, real: str) -> _Listing:
    """List one folder; one below the root that cannot be listed is closed and empty."""
    found = _Listing()
    try:
        found.folders[folder] = stamp(real)
        with os.scandir(real) as entries:
            for entry in entries:
                _sort_in(entry, folder, found)
    except OSError as error:
        if not folder:
            raise
        return _Listing(closed=[_closed(folder, error)])
    return found


def _closed(folder: str, error: OSError) -> str:
    return f"{folder} ({error.strerror or type(error).__name__})"


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def _sort_in(entry: os.DirEntry[str], folder: str, found: _Listing) -> None:
    """Put an entry of a folder where it belongs; only links are resolved."""
    path = f"{folder}/{entry.name}" if folder else entry.name
    is_image = _is_image(entry.name)
    try:
        is_folder = entry.is_dir()
    except OSError as error:  # a link to itself, or to behind a folder that is closed
        is_folder = False
        if not is_image and system_name(entry.name) is None:
            found.closed.append(_closed(path, error))
            return
    if (system := system_name(entry.name)) is not None:
        if system != "hidden" or is_folder or is_image:  # .DS_Store and the like do not matter
            found.system[system] += 1
    elif is_folder and entry.is_symlink():
        found.links[path] = os.path.realpath(entry.path)
    elif is_folder:
        found.inner[path] = entry.path
    elif is_image and _is_special(entry):
        found.special.append(path)
    elif is_image:
        found.paths.append(path)
        if entry.is_symlink():
            found.linked_files.append(path)
    elif entry.name.lower().endswith(UNREAD_SUFFIXES):
        found.unread[os.path.splitext(entry.name)[1].lower()] += 1


def _is_special(entry: os.DirEntry[str]) -> bool:
    """Whether it is a pipe, socket or device, whose reading may never end."""
    try:
        return not entry.is_file() and os.path.exists(entry.path)
    except OSError:
        return False


def follow(path: str, folders: dict[str, str]) -> str:
    """Where a link to a file leads.

    Args:
        path: the link, absolute.
        folders: real paths of folders that are known already; those that are met are added.

    Returns:
        The real path; for a link that leads round in a circle one of its names.
    """
    for _ in range(_MOST_LINKS):
        folder, name = os.path.split(path)
        if folder not in folders:
            folders[folder] = os.path.realpath(folder)
        path = os.path.join(folders[folder], name)
        try:
            path = os.path.join(folders[folder], os.readlink(path))
        except OSError:  # no link
            break
    return path


class RealPaths:
    """Real paths of many files, with one look at each of their folders."""

    def __init__(self) -> None:
        self._folders: dict[str, tuple[str, dict[str, str]]] = {}
        self._real: dict[str, str] = {}

    def of(self, path: str) -> str:
        """The real path of an absolute path; also where nothing is there."""
        folder, _, name = path.rpartition("/")
        if folder not in self._folders:
            self._folders[folder] = self._look(folder)
        real, links = self._folders[folder]
        return links.get(name) or f"{real}/{name}"

    def _look(self, folder: str) -> tuple[str, dict[str, str]]:
        real = os.path.realpath(folder or "/")
        try:
            with os.scandir(real) as entries:
                links = [entry for entry in entries if entry.is_symlink()]
        except OSError:  # not there or closed: the reader of the file says so
            links = []
        return real, {link.name: follow(link.path, self._real) for link in links}


def first_shared(ours: Iterable[str], theirs: Iterable[str]) -> tuple[int, int] | None:
    """The first of our absolute paths whose file is among theirs, and its place there, from 0."""
    real = RealPaths()
    known = np.fromiter((hash(real.of(path)) for path in theirs), np.int64)
    mine = np.fromiter((hash(real.of(path)) for path in ours), np.int64)
    shared = np.flatnonzero(np.isin(mine, known))
    if not len(shared):
        return None
    return int(shared[0]), int(np.flatnonzero(known == mine[shared[0]])[0])
