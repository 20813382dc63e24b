"""The order of the images: a function of (seed, epoch), cut the same way for any number of readers.

Every global batch holds the same images in the same places whatever the number of workers and
processes; each process takes its slice of each global batch. The sampler hands out batch keys that
say all a worker must know, so workers keep no state and a run resumes at any batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Sampler

from msn.data.randomness import permutation
from msn.errors import UserError

_ORDER = 1  # keeps the order's draws apart from those of the views


class BatchKey(NamedTuple):
    """What a worker needs to make one batch: epoch, number of the batch in it, images int64 [B]."""

    epoch: int
    batch: int
    indices: np.ndarray


class EpochSampler(Sampler[BatchKey]):
    """Batches of one process, epoch by epoch.

    Args:
        num_images: size of the training set.
        global_batch_size: images a step, over all processes.
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
        """Images that an epoch leaves out because batches do not divide them; others each time."""
        return self.num_images % self.global_batch_size

    def __len__(self) -> int:
        """Batches in a whole epoch, also when this one was resumed in its middle."""
        return self.num_images // self.global_batch_size

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch; called again for the same one it keeps the position."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def __iter__(self) -> Iterator[BatchKey]:
        """Yield this process's keys from the position on."""
        # Not a generator: epoch and position are those of now, not of the first `next`.
        return iter(self.keys(self.epoch)[self.start :])

    def keys(self, epoch: int) -> list[BatchKey]:
        """All keys of an epoch for this process."""
        order = permutation(self.num_images, self.seed, _ORDER, epoch)
        batches = order[: len(self) * self.global_batch_size].reshape(len(self), -1)
        share = self.global_batch_size // self.world_size
        mine = batches[:, self.rank * share : (self.rank + 1) * share]
        return [BatchKey(epoch, number, indices) for number, indices in enumerate(mine)]

    def state_dict(self) -> dict[str, Any]:
        """The position: the next batch to hand out is number `batch` of `epoch`."""
        return {"epoch": self.epoch, "batch": self.start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a stored position; the end of an epoch is the start of the next."""
        self.epoch, self.start = int(state["epoch"]), int(state["batch"])
        if self.start >= len(self):
            self.epoch, self.start = self.epoch + 1, 0
