"""Which folders below a root train and which are held out."""

from __future__ import annotations

import logging
import os

from msn.errors import UserError

log = logging.getLogger(__name__)

TRAIN = "train"
HELD_OUT = ("val", "valid", "validation", "test")  # names beside `train`, the first one there is


def find_parts(root: str, val_root: str | None) -> tuple[str, str | None]:
    """Where the training images are, and where those that are held out.

    `train` is a part, and not a class of that name, where `val` lies beside it, where everything
    beside it is named like a part, or where `val_root` is given.

    Args:
        root: as set; a folder, or a file (a list of images, one shard).
        val_root: as set.

    Returns:
        The training root, and the root of the held-out images or None where there is none.

    Raises:
        UserError: if held-out images would be trained on.
    """
    folders = _folders(root)
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


def _folders(root: str) -> set[str]:
    if not os.path.isdir(root):
        return set()
    with os.scandir(root) as entries:
        return {e.name for e in entries if e.is_dir() and not e.name.startswith(".")}


def _refuse_overlap(train: str, held_out: str) -> None:
    first, second = os.path.realpath(train), os.path.realpath(held_out)
    common = os.path.commonpath([first, second])
    if common in (first, second):
        how = "is" if first == second else "lies inside" if common == first else "holds"
        raise UserError(
            f"data.val_root={held_out}: {how} the training folder {train}, and held-out images "
            "must not be trained on"
        )
