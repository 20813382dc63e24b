"""Meaning of folder names: which images train, which are held out, and their classes."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from msn.data.index import system_name
from msn.errors import UserError
from msn.images.kinds import SUFFIXES

log = logging.getLogger(__name__)

TRAIN = "train"
HELD_OUT = ("val", "valid", "validation", "test")  # beside `train`; the first that exists
UNLABELLED = -1  # the class number of an image without a label
_HALVES = (("labelled", "unlabelled"), ("labeled", "unlabeled"))
_OR_LIST = "or give a CSV with the columns path and label (data=list data.root=FILE)"
_MOST_FRACTIONS = 50  # distinct fractional numbers that may be classes
_DEEPEST = 8  # nested folders; links may make a circle


def find_parts(root: str, val_root: str | None) -> tuple[str, str | None]:
    """Find the folders of training images and of held-out images.

    A folder `train` is a split, not a class of that name, if `val` is beside it, if all folders
    beside it are named like splits, or if `val_root` is given. If the root holds a single folder
    and nothing else, that folder is searched instead.

    Args:
        root: as set; a folder, or a file (a list of images, one shard).
        val_root: as set.

    Returns:
        The training root, and the root of the held-out images or None.

    Raises:
        UserError: if held-out images would be trained on.
    """
    root, folders = _step_in(root)
    beside = [name for name in HELD_OUT if name in folders]
    only_parts = folders <= {TRAIN, *HELD_OUT}
    if TRAIN not in folders or not (val_root is not None or "val" in folders or only_parts):
        found = root, val_root
    elif val_root is not None:
        found = os.path.join(root, TRAIN), val_root
    else:
        found = os.path.join(root, TRAIN), os.path.join(root, beside[0]) if beside else None
        if beside[:1] != ["val"]:
            what = f"holds {beside[0]}/ out" if beside else "holds a share of it out"
            log.info("%s has no val/: trains on train/ and %s", root, what)
    train, held_out = found
    if held_out is not None:
        _refuse_overlap(train, held_out)
    return train, held_out


def _step_in(root: str) -> tuple[str, set[str]]:
    """Step into the folder that an archive put around `train`; return it and its subfolders."""
    folders = inside = _folders(root)
    inner = root
    for _ in range(_DEEPEST):
        if len(inside) != 1 or TRAIN in inside or _holds_data(inner):
            break
        inner = os.path.join(inner, *inside)
        inside = _folders(inner)
    if inner == root or TRAIN not in inside:
        return root, folders  # the labels handle further folders around the classes
    log.info("%s holds nothing but %s, where train/ is: takes that", root, inner)
    return inner, inside


def _folders(root: str) -> set[str]:
    if not os.path.isdir(root):
        return set()
    with os.scandir(root) as entries:
        return {e.name for e in entries if system_name(e.name) is None and _is_folder(e)}


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _holds_data(folder: str) -> bool:
    """Whether images or shards lie directly in a folder."""
    with os.scandir(folder) as entries:
        return any(e.name.lower().endswith((*SUFFIXES, ".tar")) for e in entries)


def _refuse_overlap(train: str, held_out: str) -> None:
    first, second = os.path.realpath(train), os.path.realpath(held_out)
    common = os.path.commonpath([first, second])
    if common in (first, second):
        how = "is" if first == second else "lies inside" if common == first else "holds"
        raise UserError(
            f"data.val_root={held_out}: {how} the training folder {train}, and held-out images "
            "must not be trained on"
        )


class FolderLabels(NamedTuple):
    """Class numbers, int64 [n], or None; names of the classes; why there are none."""

    labels: np.ndarray | None
    classes: list[str]
    why: str


def read_folder_labels(paths: Sequence[str], *, where: str) -> FolderLabels:
    """Label images by the first folder of their paths that is not the same for all.

    Of two folders `labelled` and `unlabelled`, the folders in `labelled` are the classes.

    Args:
        paths: sorted relative paths.
        where: name of their folder in messages.

    Returns:
        Labels, if every image is in one of at least two such folders.

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
    """Labels from sorted relative paths: the first folder of each is its class.

    Args:
        paths: relative paths.
        above: common prefix of all paths that is not a class: "" or folders with a `/`.

    Returns:
        Labels int64 [n] and class names; None and [] if an image is in no folder, or all in one.
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
    """One past the last of the sorted paths from `begin` on that start with a prefix."""
    step = 1
    while begin + step < len(paths) and paths[begin + step].startswith(prefix):
        step *= 2
    low, high = begin + step // 2, min(begin + step, len(paths))  # low starts so, high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if paths[middle].startswith(prefix) else (low, middle)
    return high


def _shared_folder(paths: Sequence[str]) -> str:
    """The folders that all sorted paths begin with, with a `/`; "" if there are none."""
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
        return f"all images lie in {paths[0].partition('/')[0]}/, whose folders are not classes"
    if len(loose) < len(paths):
        do = f"lie in no class folder: move them into one or away, {_OR_LIST}"
        return f"{len(loose)} of {len(paths)} images, for instance {paths[loose[0]]}, {do}"
    where = f"in one folder, {above}" if above else "in the folder itself"
    return f"all images lie {where}: put those of each class into a folder of its own, {_OR_LIST}"


def _half_labelled(
    paths: Sequence[str], inside: np.ndarray, half: str, other: str, where: str
) -> FolderLabels:
    """Labels for the images at the positions `inside`; all images train."""
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


def refuse_odd_numbers(labels: Sequence[str], where: str) -> None:
    """Where all labels are numbers: measurements are not classes, and a class has one name.

    Raises:
        UserError: they are many fractions, one is there in two ways of writing, or one is nan.
    """
    what = ""
    try:
        numbers = [float(label.replace("_", "-")) for label in labels]
    except ValueError:
        return
    names = dict(zip(numbers, labels, strict=True))
    twice = sorted(set(labels) - set(names.values()))
    if len(labels) > _MOST_FRACTIONS and not all(map(float.is_integer, numbers)):
        what = f"continuous numbers ({len(labels)} different ones, such as {labels[0]}), no classes"
    elif twice:
        what = f"{twice[0]} and {names[float(twice[0])]}, which are one number"
    elif any(map(math.isnan, numbers)):
        what = "numbers and nan; the cell of an image without a label must be empty"
    if what:
        raise UserError(
            f"{where}: the labels are {what}: data.label_column=NAME chooses another column, "
            "data.use_labels=false none"
        )
