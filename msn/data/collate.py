"""A batch of decoded images of different sizes in one buffer, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from msn.data.workers import empty


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


class PixelBuffer:
    """Takes images of different sizes one after the other into one buffer.

    Each image is copied while it is still in the cache, and its own memory is free for the next. In
    a worker process the buffer is shared memory where there is room, so that sending it copies
    nothing. Room that is not used is never touched and costs nothing.

    Args:
        count: images that are expected.
    """

    def __init__(self, count: int) -> None:
        self._expected = count
        self._pixels = torch.empty((0, 3), dtype=torch.uint8)
        self._sizes: list[tuple[int, int]] = []
        self._end = 0

    def add(self, image: np.ndarray) -> None:
        """Take an image uint8 [h, w, 3]."""
        height, width, _ = image.shape
        end = self._end + height * width
        if end > len(self._pixels):
            left = max(1, self._expected - len(self._sizes))
            self._grow(max(self._end + int(_ROOM * left * height * width), end))
        self._pixels[self._end : end].view(height, width, 3).numpy()[:] = image
        self._sizes.append((height, width))
        self._end = end

    def packed(self) -> tuple[Tensor, Tensor, Tensor]:
        """`pixels`, `starts` and `sizes` of `ImageBatch`."""
        sizes = torch.tensor(self._sizes, dtype=torch.int64).view(-1, 2)
        areas = sizes.prod(1)
        return self._pixels[: self._end], areas.cumsum(0) - areas, sizes

    def _grow(self, num_pixels: int) -> None:
        larger = empty((num_pixels, 3), torch.uint8)
        larger[: self._end] = self._pixels[: self._end]
        self._pixels = larger


_ROOM = 1.25  # times what images as large as the first would need


def pack(images: Sequence[np.ndarray]) -> tuple[Tensor, Tensor, Tensor]:
    """Put images uint8 [h, w, 3] into one buffer.

    Returns:
        `pixels`, `starts` and `sizes` of `ImageBatch`.
    """
    buffer = PixelBuffer(len(images))
    for image in images:
        buffer.add(image)
    return buffer.packed()
