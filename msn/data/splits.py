"""Which images train and which are held out."""

from __future__ import annotations

import numpy as np

from msn.data.randomness import permutation

_HOLD_OUT = 2  # keeps these draws apart from those of order and views
DIGITS_TRAIN = 1297  # the other 500 digits are held out


def hold_out_per_class(
    labels: np.ndarray, fraction: float, split_seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Hold out a seeded share of every class.

    A class keeps at least one image to train on, and gives at least one up if it has two.

    Args:
        labels: class numbers, int64 [n].
        fraction: share to hold out, in (0, 1).
        split_seed: of the choice; not the run's seed, so that every run leaves the same images out.

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
    return np.setdiff1d(np.arange(len(labels)), out), out


def split_digits(num_images: int, split_seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split the digits by a seeded permutation: 1,297 to train, the rest held out."""
    order = permutation(num_images, split_seed, _HOLD_OUT)
    return np.sort(order[:DIGITS_TRAIN]), np.sort(order[DIGITS_TRAIN:])
