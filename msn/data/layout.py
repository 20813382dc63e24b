"""Which folders below a root train and which are held out."""

from __future__ import annotations

import logging
import os

from msn.data.index import system_name
from msn.data.kinds import SUFFIXES
from msn.errors import UserError

log = logging.getLogger(__name__)

TRAIN = "train"
HELD_OUT = ("val", "valid", "validation", "test")  # names beside `train`, the first one there is
_DEEPEST = 8  # folders around each other; links may make a circle


def find_parts(root: str, val_root: str | None) -> tuple[str, str | None]:
    """Where the training images are, and where those that are held out.

    `train` is a part, and not a class of that name, where `val` lies beside it, where everything
    beside it is named like a part, or where `val_root` is given. A folder around it, the only one
    below the root, is stepped into.

    Args:
        root: as set; a folder, or a file (a list of images, one shard).
        val_root: as set.

    Returns:
        The training root, and the root of the held-out images or None where there is none.

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
    """The folder that an archive put around `train`, if nothing else is there, and its folders."""
    folders = inside = _folders(root)
    inner = root
    for _ in range(_DEEPEST):
        if len(inside) != 1 or TRAIN in inside or _holds_data(inner):
            break
        inner = os.path.join(inner, *inside)
        inside = _folders(inner)
    if inner == root or TRAIN not in inside:
        return root, folders  # of further folders around classes the labels take care
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
    """Whether images or shards lie in a folder itself."""
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
