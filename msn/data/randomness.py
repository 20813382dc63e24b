"""Random numbers without state: a draw is a function of its coordinates, so nothing is replayed."""

from __future__ import annotations

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser, a bijection of words in which every input bit moves every output."""
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


def counter_hash(*coordinates: int | np.ndarray) -> np.ndarray:
    """Hash integer coordinates, broadcast against each other, to uniform 64-bit words.

    Args:
        coordinates: integers or integer arrays that broadcast, for instance seed, epoch, index
            [B, 1], view [V]. Their order matters; negative numbers count modulo 2**64.

    Returns:
        Words of the broadcast shape, uint64.
    """
    state = np.zeros(1, np.uint64)
    for coordinate in coordinates:
        # Each level is a SplitMix64 stream of its own, seeded by the level above.
        word = (
            np.asarray(coordinate)
            .astype(np.int64)
            .astype(np.uint64)
            .reshape(np.shape(coordinate) or 1)
        )
        state = _mix(state + _GOLDEN * (word + np.uint64(1)))
    return state


def uniform(*coordinates: int | np.ndarray) -> np.ndarray:
    """Uniform float64 numbers in [0, 1), one for each point of the broadcast coordinates."""
    return (counter_hash(*coordinates) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(length: int, *coordinates: int) -> np.ndarray:
    """Draw a random order of range(length) that depends on the coordinates alone, int64 [length].

    Sorting hashes instead of shuffling keeps it a pure function of its arguments; the stable sort
    makes the order the same on every machine even where two hashes collide.
    """
    return np.argsort(counter_hash(*coordinates, np.arange(length)), kind="stable")
