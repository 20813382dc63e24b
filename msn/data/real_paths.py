"""The real path of a file, so that two names of one file are one image.

Nothing here looks at a file that is no link: folders say which of their entries are links.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import numpy as np

_MOST_LINKS = 40  # one after the other, as in the kernel


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
        except OSError:  # not there or closed: whoever reads the file says so
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
