"""From settings to the images that train, those with labels to learn from, and those held out."""

from __future__ import annotations

import os
from typing import NamedTuple

import numpy as np

from msn.data.bundled import digits_source, torchvision_source
from msn.data.dataset import Subset
from msn.data.shards import shard_source
from msn.data.sources import Source, check_folder, folder_source, list_source
from msn.data.splits import hold_out_per_class, split_digits
from msn.errors import UserError

SOURCES = ("digits", "folder", "imagenet", "cifar10", "cifar100", "stl10", "list", "shards")


class Pools(NamedTuple):
    """Which images are what; `labelled` and `held_out` are None where there are no labels."""

    train: Subset
    labelled: Subset | None
    held_out: Subset | None


def build_pools(
    *,
    source: str,
    root: str | None,
    val_root: str | None,
    hold_out: float,
    split_seed: int,
    use_labels: bool,
    download: bool,
    image_size: int,
) -> Pools:
    """Find the images and decide which ones train.

    `train` and `val` below the root are used where there are both; else `val_root`; else, where
    there are labels, a seeded share of every class is held out. The arguments are those of
    `MSNDataModule`.

    Raises:
        UserError: a setting is wrong, or there are no images.
    """
    if source not in SOURCES:
        raise UserError(f"data.source={source}: must be one of {', '.join(SOURCES)}")
    if not 0 < hold_out < 1:
        raise UserError(f"data.hold_out={hold_out}: must lie in (0, 1)")
    if source == "digits":
        return _digits(root, val_root, image_size, split_seed)
    if root is None:
        raise UserError(f"data.root is not set: data={source} needs data.root=DIR")
    if source in ("cifar10", "cifar100", "stl10"):
        return _torchvision(source, root, download)
    if source == "imagenet":
        for part in ("train", "val"):
            check_folder(os.path.join(root, part), key=f"data.root={root} needs {part}/; data.root")
    train_root, found_val = _train_and_val(root, val_root)
    train = _read(source, train_root, key="data.root", use_labels=use_labels)
    if found_val is not None:
        held_out = _read(source, found_val, key="data.val_root", use_labels=use_labels)
        return _with_held_out(train, held_out)
    if train.labels is None:
        return Pools(Subset(train), None, None)
    kept, out = hold_out_per_class(train.labels, hold_out, split_seed)
    return Pools(Subset(train, kept), Subset(train, kept), Subset(train, out))


def _digits(root: str | None, val_root: str | None, image_size: int, split_seed: int) -> Pools:
    given = root if root is not None else val_root
    if given is not None:
        raise UserError(f"data.root={given}: digits have no root; use data=folder for your images")
    digits = digits_source(image_size)
    kept, out = split_digits(len(digits), split_seed)
    return Pools(Subset(digits, kept), Subset(digits, kept), Subset(digits, out))


def _torchvision(name: str, root: str, download: bool) -> Pools:
    labelled = torchvision_source(name, root, split="train", download=download)
    held_out = torchvision_source(name, root, split="test", download=download)
    train: Source = labelled
    if name == "stl10":
        train = torchvision_source(name, root, split="unlabeled", download=download)
    return Pools(Subset(train), Subset(labelled), Subset(held_out))


def _train_and_val(root: str, val_root: str | None) -> tuple[str, str | None]:
    train, val = os.path.join(root, "train"), os.path.join(root, "val")
    if os.path.isdir(train) and (val_root is not None or os.path.isdir(val)):
        return train, val if val_root is None else val_root
    return root, val_root


def _read(source: str, root: str, *, key: str, use_labels: bool) -> Source:
    if source == "shards":
        return shard_source(root, key=key, use_labels=use_labels)
    if source == "list":
        return list_source(root, key=key, root=None)
    return folder_source(root, key=key, use_labels=use_labels)


def _with_held_out(train: Source, held_out: Source) -> Pools:
    """Pair two sources whose classes must mean the same."""
    if train.labels is None or held_out.labels is None:
        return Pools(Subset(train), None, None)
    unknown = sorted(set(held_out.classes) - set(train.classes))
    if unknown:
        raise UserError(
            f"{held_out.where}: class {unknown[0]} is not among the training classes "
            f"({', '.join(train.classes[:5])}{', ...' if len(train.classes) > 5 else ''})"
        )
    number = {name: i for i, name in enumerate(train.classes)}
    renumber = np.array([number[name] for name in held_out.classes])
    held_out.labels, held_out.classes = renumber[held_out.labels], train.classes
    return Pools(Subset(train), Subset(train), Subset(held_out))
