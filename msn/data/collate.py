"""A batch of decoded images of different sizes in one buffer, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info


class BadImage(NamedTuple):
    """One image that could not be read: its number in the training set, its path, the reason."""

    index: int  # type: ignore[assignment]
    path: str
    reason: str


class ImageBatch(NamedTuple):
    """B decoded images on their way to the views.

    Attributes:
        pixels: rows of all images one after another, uint8 [sum of h * w, 3].
        starts: where each image begins, as a row number of `pixels`, int64 [B].
        sizes: height and width of each image as it lies in `pixels`, int64 [B, 2].
        table: parameters of the views, float32 [V, B, columns]; boxes in px of these sizes.
        epoch: the batch's epoch, from 0.
        batch: number of the batch in its epoch, from 0.
        indices: which image of the training set each one is, int64 [B].
        bad: images that had to be replaced, and images found unreadable while looking for one.
    """

    pixels: Tensor
    starts: Tensor
    sizes: Tensor
    table: Tensor
    epoch: int
    batch: int
    indices: Tensor
    bad: list[BadImage]

    def image(self, position: int) -> Tensor:
        """Pixels of one image, uint8 [h, w, 3], a view of the buffer."""
        start = int(self.starts[position])
        height, width = self.sizes[position].tolist()
        return self.pixels[start : start + height * width].view(height, width, 3)


def pack(images: Sequence[np.ndarray]) -> tuple[Tensor, Tensor, Tensor]:
    """Put images of different sizes into one buffer.

    In a worker process the buffer is shared memory, so that sending it copies nothing.

    Args:
        images: uint8 arrays [h, w, 3].

    Returns:
        `pixels`, `starts` and `sizes` of `ImageBatch`.
    """
    sizes = np.array([image.shape[:2] for image in images], np.int64).reshape(-1, 2)
    ends = sizes.prod(1).cumsum()
    pixels = _buffer(int(ends[-1]) if len(ends) else 0)
    rows = pixels.numpy()
    for image, end in zip(images, ends, strict=True):
        height, width, _ = image.shape
        rows[end - height * width : end].reshape(height, width, 3)[:] = image
    starts = ends - sizes.prod(1)
    return pixels, torch.from_numpy(starts), torch.from_numpy(sizes)


def _buffer(num_pixels: int) -> Tensor:
    if get_worker_info() is None:
        return torch.empty((num_pixels, 3), dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(num_pixels * 3)
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, (num_pixels, 3), (3, 1))
