"""Augmented images for probes and fine-tuning: each view is a function of seed, epoch and image."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from msn.data.randomness import counter_hash, permutation
from msn.evaluation.features import LabelledSet

_ORDER, _VIEW = 6, 7  # keep these draws apart


class AugmentedImages(Dataset[tuple[Tensor, int]]):
    """Views of one epoch with labels; workers and their number change nothing.

    Args:
        images: labelled images.
        positions: those to use, [n].
        transform: draws from the global generators of torch, numpy and Python.
        seed: of the draws.
        epoch: likewise.
    """

    def __init__(
        self,
        images: LabelledSet,
        positions: Tensor,
        transform: Callable[[Image.Image], Tensor],
        *,
        seed: int,
        epoch: int,
    ) -> None:
        self.images, self.positions, self.transform = images, positions, transform
        self.seed, self.epoch = seed, epoch

    def __len__(self) -> int:
        """Number of images."""
        return len(self.positions)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        """The view and label of image i."""
        position = int(self.positions[i])
        with seeded(self.seed, _VIEW, self.epoch, position):
            return self.transform(self.images[position]), int(self.images.labels[position])


def epoch_batches(count: int, batch_size: int, *, seed: int, epoch: int) -> list[list[int]]:
    """A seeded order of range(count), cut into whole batches; the rest waits for another epoch."""
    order = permutation(count, seed, _ORDER, epoch).tolist()
    return [order[at : at + batch_size] for at in range(0, count - batch_size + 1, batch_size)]


def in_pieces(batch: Sequence[int], size: int) -> list[list[int]]:
    """A batch in pieces that fit on a device."""
    return [list(batch[at : at + size]) for at in range(0, len(batch), size)]


@contextmanager
def seeded(*coordinates: int) -> Iterator[None]:
    """Seed torch (CPU), numpy and Python inside the block, and leave them as they were."""
    seed = int(counter_hash(*coordinates)[0] % 2**32)
    python, numbers, state = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)  # noqa: NPY002
        torch.set_rng_state(state)
