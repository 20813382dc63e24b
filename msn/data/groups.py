"""Checks that no group (of one patient, plant or film) and no file is on both sides of a split."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

import numpy as np

from msn.data.hf import HFSource
from msn.data.index import first_shared
from msn.data.sampler import permutation
from msn.data.shards import ShardSource
from msn.data.sources import FileSource, Source
from msn.errors import UserError

_GROUPS = 6  # keeps these draws apart from others of the same seed


def find_groups(images: Source, group: str | None) -> None:
    """Set the groups of a source from its paths, unless a column gave them.

    Raises:
        UserError: `group` is neither a column nor found in every path.
    """
    if group is None or images.groups is not None:
        return
    try:
        pattern = re.compile(group)
    except re.error as error:
        raise UserError(
            f"data.group={group}: is no column and no regular expression ({error})"
        ) from None
    numbers: dict[str, int] = {}
    groups = np.empty(len(images), np.int64)
    for i in range(len(images)):
        found = pattern.search(images.name(i))
        text = "" if found is None else found[1 if pattern.groups else 0] or ""
        if not text:
            raise UserError(
                f"data.group={group}: is no column of {images.where} and, as a regular expression, "
                f"not found in {images.name(i)}"
            )
        groups[i] = numbers.setdefault(text, len(numbers))
    images.groups, images.group_names = groups, list(numbers)


def refuse_shared(train: Source, held_out: Source) -> None:
    """Raise a UserError if a file, by whatever name, or a shard is in both sources."""
    if isinstance(train, FileSource) and isinstance(held_out, FileSource):
        if not train.linked and not held_out.linked:
            return  # neither lies in the other's folder, see `find_parts`
        names: tuple[Sequence[str], Sequence[str]] = (held_out.paths, train.paths)
        shared = first_shared(*(map(s.path, range(len(s))) for s in (held_out, train)))
    elif isinstance(train, HFSource) and isinstance(held_out, HFSource):
        names = ([f"{', '.join(held_out.splits)}, the same rows,"], [*train.splits])
        shared = (0, 0) if held_out.identity(0) == train.identity(0) else None
    else:
        assert isinstance(train, ShardSource)
        assert isinstance(held_out, ShardSource)
        names = (held_out.shards, train.shards)
        shared = first_shared(*(map(os.path.abspath, shards) for shards in names))
    if shared is not None:
        ours, theirs = (names[k][i] for k, i in enumerate(shared))
        alias = "" if ours == theirs else f", as {theirs}"
        raise UserError(
            f"data.val_root={held_out.where}: {ours} is in data.root={train.where} too{alias}; "
            "held-out images must not be trained on"
        )


def refuse_shared_groups(train: Source, held_out: Source) -> None:
    """Raise a UserError if images of one group are to train and to test."""
    shared = sorted(set(train.group_names) & set(held_out.group_names))
    if shared:
        raise UserError(
            f"data.group: the group {shared[0]} is in {held_out.where} and in {train.where}; "
            "held-out images must be of other groups"
        )


def hold_out_groups(
    labels: np.ndarray, groups: np.ndarray, fraction: float, split_seed: int
) -> np.ndarray:
    """Hold out whole groups that contain about a share of every class.

    Groups are tried in a seeded order; one is held out if that brings the classes nearer to their
    share and no class loses its last image. If none does, the nearest one is held out.

    Args:
        labels: class numbers, int64 [n].
        groups: group numbers, int64 [n].
        fraction: share to hold out, in (0, 1).
        split_seed: of the order.

    Returns:
        Numbers of the groups to hold out; empty if every group is all that some class has.
    """
    numbers, inverse = np.unique(groups, return_inverse=True)
    counts = np.zeros((len(numbers), int(labels.max()) + 1))
    np.add.at(counts, (inverse, labels), 1)
    counts = counts[:, counts.sum(axis=0) > 0]
    total = counts.sum(axis=0)

    def distance(taken: np.ndarray) -> float:
        return float(np.abs(taken / total - fraction).sum()) if (taken < total).all() else np.inf

    out, taken = [], np.zeros_like(total)
    for group in permutation(len(numbers), split_seed, _GROUPS).tolist():
        if distance(taken + counts[group]) < distance(taken):
            out.append(group)
            taken = taken + counts[group]
    if not out:
        away = [distance(one) for one in counts]
        out = [int(np.argmin(away))] if np.isfinite(away).any() else []
    return np.sort(numbers[out])
