"""Labels that the folders of images give: which rule decides, and why there may be none."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from msn.errors import UserError

log = logging.getLogger(__name__)

UNLABELLED = -1  # the class number of an image without a label
_HALVES = (("labelled", "unlabelled"), ("labeled", "unlabeled"))
_OR_LIST = "or give a CSV with the columns path and label (data=list data.root=FILE)"


class FolderLabels(NamedTuple):
    """Class numbers, int64 [n], or None; names of the classes; why there are none."""

    labels: np.ndarray | None
    classes: list[str]
    why: str


def read_folder_labels(paths: Sequence[str], *, where: str) -> FolderLabels:
    """The label of an image is the first folder of its path that is not the same for all.

    Two folders `labelled` and `unlabelled` are no classes: the folders in the first one are.

    Args:
        paths: sorted relative paths.
        where: what a message calls their folder.

    Returns:
        Labels where every image lies in one of at least two such folders.

    Raises:
        UserError: `labelled` and `unlabelled` lie beside further folders.
    """
    above = _shared_folder(paths)
    labels, classes = labels_from_folders(paths, above)
    if labels is None:
        return FolderLabels(None, [], _why_none(paths, above))
    if above:
        log.info("%s: all images lie in %s: the folders in it are the classes", where, above)
    for half, other in _HALVES:
        if {half, other} <= set(classes):
            further = sorted(set(classes) - {half, other})
            if further:
                raise UserError(
                    f"{where}: holds {half}/ and {other}/ beside {further[0]}/; move what trains "
                    f"below train/, what is held out elsewhere (data.val_root=DIR), "
                    f"or set data.use_labels=false"
                )
            inside = np.flatnonzero(labels == classes.index(half))
            return _half_labelled(paths, inside, half, other, where)
    return FolderLabels(labels, classes, "")


def labels_from_folders(
    paths: Sequence[str], above: str = ""
) -> tuple[np.ndarray | None, list[str]]:
    """Read labels off sorted relative paths: the first folder of each is its class.

    Args:
        paths: relative paths.
        above: what all of them begin with and which is no class: "" or folders with a `/`.

    Returns:
        Labels int64 [n] and class names; None and [] if one lies outside any folder, or all in one.
    """
    classes: dict[str, int] = {}
    labels = np.empty(len(paths), np.int64)
    begin = 0
    while begin < len(paths):
        folder, slash, _ = paths[begin][len(above) :].partition("/")
        if not slash:
            return None, []
        end = _end_of_run(paths, begin, above + folder + slash)
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


def _shared_folder(paths: Sequence[str]) -> str:
    """The folders that all sorted paths begin with, with a `/`; "" where there are none."""
    first, last = paths[0], paths[len(paths) - 1]
    above = ""
    while True:
        folder, slash, _ = first[len(above) :].partition("/")
        inner = above + folder + slash
        if not slash or not last.startswith(inner) or folder in dict(_HALVES).values():
            return above
        above = inner


def _why_none(paths: Sequence[str], above: str) -> str:
    loose = [i for i, path in enumerate(paths) if "/" not in path[len(above) :]]
    if not loose:
        return f"all images lie in {paths[0].partition('/')[0]}/, whose folders are no classes"
    if len(loose) < len(paths):
        do = f"lie in no class folder: move them into one or away, {_OR_LIST}"
        return f"{len(loose)} of {len(paths)} images, for instance {paths[loose[0]]}, {do}"
    where = f"in one folder, {above}" if above else "in the folder itself"
    return f"all images lie {where}: put those of each class into a folder of its own, {_OR_LIST}"


def _half_labelled(
    paths: Sequence[str], inside: np.ndarray, half: str, other: str, where: str
) -> FolderLabels:
    """All images train; those at the positions `inside` have labels."""
    names = [paths[int(i)] for i in inside]
    found, classes = labels_from_folders(names, _shared_folder(names))
    if found is None:
        why = (
            f"{half}/ beside {other}/ must hold two class folders or more, and nothing beside them"
        )
        return FolderLabels(None, [], why)
    labels = np.full(len(paths), UNLABELLED)
    labels[inside] = found
    log.info(
        "%s: trains on all images; %d in %s/ have labels (%d classes), %d in %s/ have none",
        *(where, len(inside), half, len(classes), len(paths) - len(inside), other),
    )
    return FolderLabels(labels, classes, "")
