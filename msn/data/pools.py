"""Pools of images: those that train, labelled ones for classifiers, and held-out ones."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from msn.data.dataset import Subset
from msn.data.groups import (
    find_groups,
    hold_out_groups,
    refuse_shared,
    refuse_shared_groups,
)
from msn.data.hf import hf_sources, hf_whole
from msn.data.layout import UNLABELLED, find_parts
from msn.data.lists import Columns
from msn.data.sampler import permutation
from msn.data.shards import shard_source
from msn.data.sources import (
    TORCHVISION,
    ArraySource,
    FileSource,
    Source,
    check_folder,
    digits_source,
    find_depth,
    folder_source,
    list_source,
    torchvision_source,
)
from msn.errors import UserError
from msn.images.decode import full_size
from msn.images.depth import AUTO, Depth, check_depth
from msn.images.kinds import SUFFIXES, BadImageError

log = logging.getLogger(__name__)

SOURCES = ("digits", "folder", "imagenet", *TORCHVISION, "list", "shards", "hf")
# Keys that only these sources read.
_READ_BY = {
    "image_column": ("list", "hf"),
    "label_column": ("list", "hf"),
    "image_dir": ("list",),
    "suffix": ("list",),
    "group": ("list", "folder", "imagenet", "shards", "hf"),
}
_LARGEST_DIGIT = 512  # px of 8; all 1,797 are held in memory
_UNUSED = "data.use_labels=false"
_PROBED = 16  # images tried until one can be decoded
_LIST_PATHS = (
    "a list names files with their endings (data.suffix=.jpg adds one) and with / between folders, "
    "no URLs; data.image_dir=DIR says where they are; "
    "relative paths start at"
)
_HOLD_OUT = 2  # keeps these draws apart from those of order and views
_DIGITS_TRAIN = 1297  # the other 500 digits are held out


@dataclass(frozen=True, kw_only=True)
class PoolSettings:
    """Where the images are, and which ones train; the values live in `configs/data/*.yaml`.

    Raises:
        UserError: a value is out of its range, or the source does not read it.
    """

    source: str  # one of SOURCES
    root: str | None  # where the source's files are; None for digits
    # Where held-out images are; None looks for `val` beside `train` below the root, else holds out
    # a share of every class.
    val_root: str | None
    hold_out: float  # that share, in (0, 1)
    split_seed: int  # of that choice; not the run's seed, so that every run holds out the same
    use_labels: bool  # False ignores folder names and label columns
    download: bool  # whether torchvision may fetch one of its sets
    image_size: int | None  # side of the upsampled digits in px; None for everything else
    # For images of more than 8 bits: a number of bits, the values that are black and white, or
    # `auto`, which looks at a sample of the training images. Runs without the key trained with 16.
    depth: str | int | Sequence[int] = 16
    image_column: str | None = None  # of a table; None finds it by its name
    label_column: str | None = None
    image_dir: str | None = None  # folder of a list's relative paths; None: that of the list
    suffix: str | None = None  # of a list's images where its names have none
    # Column of a list or data set, or a regular expression found in every path (its first bracket,
    # else all of it), that gives the group of an image: never on both sides of a split.
    group: str | None = None

    def __post_init__(self) -> None:
        self._check_source()
        if not 0 < self.hold_out < 1:
            raise UserError(f"data.hold_out={self.hold_out}: must lie in (0, 1)")
        if not 0 <= self.split_seed < 2**32:
            raise UserError(f"data.split_seed={self.split_seed}: must be in [0, 2^32)")

    def _check_source(self) -> None:
        """Refuse keys that the source needs and lacks, or has and does not read."""
        source, size = self.source, self.image_size
        if source not in SOURCES:
            raise UserError(f"data.source={source}: must be one of {', '.join(SOURCES)}")
        if source == "digits":
            for key, given in {"root": self.root, "val_root": self.val_root}.items():
                if given is not None:
                    raise UserError(
                        f"data.{key}={given}: digits have no {key}; data=folder reads your images"
                    )
            if size is None or not 1 <= size <= _LARGEST_DIGIT:
                raise UserError(
                    f"data.image_size={size}: must be a whole number in [1, {_LARGEST_DIGIT}]"
                )
        elif size is not None:
            raise UserError(
                f"data.image_size={size}: digits alone are upsampled, it must be null; "
                "model.img_size is what the network sees"
            )
        elif self.root is None:
            raise UserError(f"data.root is not set: data={source} needs data.root=DIR")
        if source in TORCHVISION and self.val_root is not None:
            raise UserError(f"data.val_root={self.val_root}: {source} has its own test images")
        if self.suffix is not None and self.suffix.lower() not in SUFFIXES:
            raise UserError(f"data.suffix={self.suffix}: must be one of {', '.join(SUFFIXES)}")
        for key, sources in _READ_BY.items():
            if getattr(self, key) is not None and source not in sources:
                raise UserError(
                    f"data.{key}={getattr(self, key)}: data={source} has none; it must be null "
                    f"(data={' and data='.join(sources)} read it)"
                )
        if self.download and source not in TORCHVISION:
            raise UserError(f"data.download=true: only {', '.join(TORCHVISION)} can be fetched")


class Pools(NamedTuple):
    """Images by their use; `labelled` and `held_out` are None if there are no labels."""

    train: Subset
    labelled: Subset | None
    held_out: Subset | None
    why: str = ""  # reason for that, and what to do about it


def build_pools(settings: PoolSettings) -> Pools:
    """Find the images and split them.

    `train` and `val` below the root are used if both exist (see `find_parts`); else `val_root`;
    else, if there are labels, a seeded share of every class is held out.

    Raises:
        UserError: held-out images would be trained on, or there are no images that can be read.
    """
    wanted = check_depth(settings.depth)
    pools = _find_pools(settings)
    _fix_depth(pools, wanted)
    return pools


def whole_source(settings: PoolSettings) -> Source:
    """Every image of a data set, also those that a training would hold out.

    Raises:
        UserError: there is no such data set, it is torchvision's, or no image can be read.
    """
    name, root = settings.source, settings.root
    if name in TORCHVISION or settings.val_root is not None:
        raise UserError(f"data={name}: not read here; data=folder, list, shards or hf, no val_root")
    if name == "digits":
        assert settings.image_size is not None
        digits = digits_source(settings.image_size)
        if not settings.use_labels:
            digits.labels, digits.classes, digits.why = None, [], _UNUSED
        return digits
    assert root is not None
    if name == "hf":
        return hf_whole(root, columns=_columns(settings), use_labels=settings.use_labels)
    found = _read(settings, root, key="data.root")
    find_groups(found, settings.group)
    return found


def _fix_depth(pools: Pools, wanted: str | Depth) -> None:
    """Set the depth of all images to that of the training images."""
    train = pools.train.source
    if isinstance(train, ArraySource):
        if wanted not in (AUTO, 16):
            raise UserError(f"data.depth={wanted}: {train.where} has 8 bits; must be auto")
        return
    found = find_depth(train, wanted)
    for pool in pools[:3]:
        if pool is not None:
            pool.source.depth = found


def _find_pools(settings: PoolSettings) -> Pools:
    source, root, val_root = settings.source, settings.root, settings.val_root
    use_labels = settings.use_labels
    if source == "digits":
        assert settings.image_size is not None
        return _digits(settings.image_size, settings.split_seed, use_labels)
    assert root is not None
    if source in TORCHVISION:
        return _torchvision(source, root, settings.download, use_labels)
    if source == "imagenet":
        for part in ("train", "val") if val_root is None else ("train",):
            check_folder(os.path.join(root, part), key=f"data.root={root} needs {part}/; data.root")
    if source == "hf":
        return _hugging_face(settings)
    train_root, found_val = find_parts(root, val_root)
    train = _read(settings, train_root, key="data.root")
    find_groups(train, settings.group)
    if found_val is not None:
        held_out = _read(settings, found_val, key="data.val_root")
        find_groups(held_out, settings.group)
        refuse_shared(train, held_out)
        if val_root is not None or held_out.labels is not None:
            return _with_held_out(train, held_out)
        log.info(
            "%s: a share of the training images is held out instead, as it has no labels: %s",
            *(found_val, held_out.why),
        )
    return _hold_out(train, settings.hold_out, settings.split_seed)


def _digits(image_size: int, split_seed: int, use_labels: bool) -> Pools:
    digits = digits_source(image_size)
    order = permutation(len(digits), split_seed, _HOLD_OUT)
    kept, out = np.sort(order[:_DIGITS_TRAIN]), np.sort(order[_DIGITS_TRAIN:])
    if not use_labels:
        return Pools(Subset(digits, kept), None, None, _UNUSED)
    return Pools(Subset(digits, kept), Subset(digits, kept), Subset(digits, out))


def _torchvision(name: str, root: str, download: bool, use_labels: bool) -> Pools:
    labelled = torchvision_source(name, root, split="train", download=download)
    train: Source = labelled
    if name == "stl10":
        train = torchvision_source(name, root, split="unlabeled", download=download)
    if not use_labels:
        return Pools(Subset(train), None, None, _UNUSED)
    held_out = torchvision_source(name, root, split="test", download=download)
    for found in (labelled, held_out):
        _refuse_unreadable(found, f"data.root={root}")
    return Pools(Subset(train), Subset(labelled), Subset(held_out))


def _hugging_face(settings: PoolSettings) -> Pools:
    assert settings.root is not None
    train, held_out = hf_sources(
        settings.root, settings.val_root, columns=_columns(settings), use_labels=settings.use_labels
    )
    _refuse_unreadable(train, f"data.root={settings.root}")
    if held_out is None:
        return _hold_out(train, settings.hold_out, settings.split_seed)
    refuse_shared(train, held_out)
    _refuse_unreadable(held_out, held_out.where)
    return _with_held_out(train, held_out)


def _columns(settings: PoolSettings) -> Columns:
    return Columns(
        settings.image_column, settings.label_column, settings.suffix or "", settings.group
    )


def _read(settings: PoolSettings, root: str, *, key: str) -> Source:
    found: Source
    source, use_labels = settings.source, settings.use_labels
    if source == "shards":
        found = shard_source(root, key=key, use_labels=use_labels)
    elif source == "list":
        base, columns = settings.image_dir, _columns(settings)
        if base is not None:
            check_folder(base, key="data.image_dir")
        found = list_source(root, key=key, root=base, use_labels=use_labels, columns=columns)
    else:
        found = folder_source(root, key=key, use_labels=use_labels)
    _refuse_unreadable(found, f"{key}={root}")
    return found


def _refuse_unreadable(images: Source, what: str) -> None:
    """Fail early if none of some images can be read."""
    reasons = []
    for i in np.linspace(0, len(images) - 1, min(_PROBED, len(images))).round().astype(np.int64):
        try:
            images.decode(int(i), full_size)
            return
        except BadImageError as error:
            reasons.append(f"{images.name(int(i))} ({error})")
    if isinstance(images, FileSource) and not os.path.isdir(images.where):
        reasons[0] += f"; {_LIST_PATHS} {os.path.abspath(images.root)}"
    raise UserError(f"{what}: no image can be read; for instance {reasons[0]}")


def hold_out_per_class(
    labels: np.ndarray, fraction: float, split_seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Hold out a seeded share of every class.

    A class of two images or more has at least one on each side; a single image trains.

    Args:
        labels: class numbers, int64 [n].
        fraction: share to hold out, in (0, 1).
        split_seed: of the choice.

    Returns:
        Sorted positions to train on and to hold out, int64.
    """
    held_out = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        order = permutation(len(members), split_seed, _HOLD_OUT, int(label))
        held_out.append(members[order[:count]])
    out = np.sort(np.concatenate(held_out))
    return _all_but(len(labels), out), out


def _all_but(count: int, out: np.ndarray) -> np.ndarray:
    stays = np.ones(count, bool)
    stays[out] = False
    return np.flatnonzero(stays)  # a set difference of a million takes a second


def _hold_out(train: Source, share: float, split_seed: int) -> Pools:
    if train.labels is None:
        return Pools(Subset(train), None, None, train.why)
    known = np.flatnonzero(train.labels != UNLABELLED)
    if train.groups is not None:
        return _hold_out_groups(train, known, share, split_seed)
    kept, out = hold_out_per_class(train.labels[known], share, split_seed)
    if not len(out):
        why = (
            f"each of the {len(train.classes)} classes has a single image, and low-shot evaluation "
            "needs one to learn from and one to test on: add images, or set data.val_root=DIR"
        )
        return Pools(Subset(train), None, None, why)
    trained = _all_but(len(train), known[out])
    return Pools(Subset(train, trained), Subset(train, known[kept]), Subset(train, known[out]))


def _hold_out_groups(train: Source, known: np.ndarray, share: float, split_seed: int) -> Pools:
    assert train.labels is not None
    assert train.groups is not None
    numbers = hold_out_groups(train.labels[known], train.groups[known], share, split_seed)
    if not len(numbers):
        why = (
            "data.group: every group holds all images of a class, so that none can be held out: "
            "set data.val_root=DIR"
        )
        return Pools(Subset(train), None, None, why)
    out = np.isin(train.groups, numbers)  # their unlabelled images do not train either
    tested = known[out[known]]
    log.info(
        "data.group: %d of %d groups are held out, with %d of %d labelled images",
        *(len(numbers), len(train.group_names), len(tested), len(known)),
    )
    kept = Subset(train, known[~out[known]])
    return Pools(Subset(train, np.flatnonzero(~out)), kept, Subset(train, tested))


def _with_held_out(train: Source, held_out: Source) -> Pools:
    """Pair two sources, which must have the same classes and no common group."""
    refuse_shared_groups(train, held_out)
    for part, other in ((train, held_out), (held_out, train)):
        if part.labels is None:
            beside = "" if other.labels is None else f" (but {other.where} has labels)"
            return Pools(Subset(train), None, None, f"{part.where}: {part.why}{beside}")
    assert train.labels is not None
    assert held_out.labels is not None
    unknown = sorted(set(held_out.classes) - set(train.classes))
    if unknown:
        raise UserError(
            f"{held_out.where}: class {unknown[0]} is not among the training classes "
            f"({', '.join(train.classes[:5])}{', ...' if len(train.classes) > 5 else ''})"
        )
    number = {name: i for i, name in enumerate(train.classes)}
    renumber = np.array([number[name] for name in held_out.classes] + [UNLABELLED])
    held_out.labels, held_out.classes = renumber[held_out.labels], train.classes
    return Pools(Subset(train), _labelled(train), _labelled(held_out))


def _labelled(source: Source) -> Subset:
    assert source.labels is not None
    return Subset(source, np.flatnonzero(source.labels != UNLABELLED))
