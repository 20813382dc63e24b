"""The order of the images, a function of (seed, epoch), and stateless random numbers.

Every global batch holds the same images in the same order for any number of workers and processes;
each process takes its slice of it. The sampler yields batch keys with all that a worker must know,
so workers keep no state and a run resumes at any batch. A random number is a function of its
coordinates.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from msn.errors import UserError

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
    """Uniform float64 numbers in [0, 1) of the broadcast shape of the coordinates."""
    return (counter_hash(*coordinates) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(length: int, *coordinates: int) -> np.ndarray:
    """Random order of range(length) that depends on the coordinates alone, int64 [length].

    The stable sort gives the same order on every machine even if two hashes collide.
    """
    return np.argsort(counter_hash(*coordinates, np.arange(length)), kind="stable")


_ORDER = 1  # keeps the order's draws apart from those of the views


class BatchKey(NamedTuple):
    """All that a worker needs to make a batch: epoch, batch in the epoch, images int64 [B]."""

    epoch: int
    batch: int
    indices: np.ndarray


class EpochSampler(Sampler[BatchKey]):
    """Batches of one process, epoch by epoch.

    Args:
        num_images: size of the training set.
        global_batch_size: images per step, over all processes.
        seed: of the run.
        rank: of this process, 0 <= rank < world_size.
        world_size: number of processes.

    Raises:
        UserError: the batch is larger than the training set or not divisible over the processes.
    """

    def __init__(
        self, *, num_images: int, global_batch_size: int, seed: int, rank: int, world_size: int
    ) -> None:
        if global_batch_size < 1:
            raise UserError(f"data.global_batch_size={global_batch_size}: must be >= 1")
        if global_batch_size > num_images:
            raise UserError(
                f"data.global_batch_size={global_batch_size}: larger than the training set, "
                f"which has {num_images} images"
            )
        if global_batch_size % world_size:
            raise UserError(
                f"data.global_batch_size={global_batch_size}: must be divisible by the number of "
                f"processes, {world_size}"
            )
        self.num_images, self.global_batch_size, self.seed = num_images, global_batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.epoch, self.start = 0, 0

    @property
    def left_out(self) -> int:
        """Images that an epoch leaves out, different ones each time, to fill whole batches."""
        return self.num_images % self.global_batch_size

    def __len__(self) -> int:
        """Batches in a whole epoch, also after a resume within one."""
        return self.num_images // self.global_batch_size

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch; for the current epoch the position stays."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def __iter__(self) -> Iterator[BatchKey]:
        """Yield this process's keys from the position on."""
        # Not a generator, which would read epoch and position only at the first `next`.
        return iter(self.keys(self.epoch)[self.start :])

    def keys(self, epoch: int) -> list[BatchKey]:
        """All keys of an epoch for this process."""
        order = permutation(self.num_images, self.seed, _ORDER, epoch)
        batches = order[: len(self) * self.global_batch_size].reshape(len(self), -1)
        share = self.global_batch_size // self.world_size
        mine = batches[:, self.rank * share : (self.rank + 1) * share]
        return [BatchKey(epoch, number, indices) for number, indices in enumerate(mine)]

    def go_to(self, epoch: int, batch: int) -> None:
        """Go to a batch, as a resumed run does; the end of an epoch is the start of the next."""
        self.epoch, self.start = epoch, batch
        if self.start >= len(self):
            self.epoch, self.start = self.epoch + 1, 0
