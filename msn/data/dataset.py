"""Batches of training images, made by worker processes, and labelled images for evaluation.

The decoded images of a batch have different sizes; they lie in one buffer without padding.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from msn.data.bad_images import BadImage, strict_message
from msn.data.layout import UNLABELLED
from msn.data.sampler import BatchKey, counter_hash
from msn.data.sources import ArraySource, Source
from msn.data.views import ViewParameters, ViewSettings, draw_parameters
from msn.data.workers import empty, shared_flags
from msn.errors import UserError
from msn.images.decode import DecodedImage
from msn.images.depth import SIXTEEN_BITS, levels_of
from msn.images.kinds import BadImageError

log = logging.getLogger(__name__)

REPLACEMENT_TRIES = 20
REPLACED = "replaced"  # in the `info` of an image that replaces an unreadable one
REDUCING_GAP = 2.0  # a crop keeps at least this many times its final size after reduction
_ROOM = 1.25  # size of the buffer over that of images all as large as the first
_GRAY, _GRAY_SIZE = (127, 127, 127), (64, 64)
_REPLACE = 3  # keeps these draws apart from those of order, split and views


class Subset:
    """Some images of a source, renumbered from 0.

    Args:
        source: where the images are.
        positions: which ones, int64 [n]; None takes all.
    """

    def __init__(self, source: Source, positions: np.ndarray | None = None) -> None:
        self.source = source
        self.positions = np.arange(len(source)) if positions is None else positions

    def __len__(self) -> int:
        """Number of images."""
        return len(self.positions)

    @property
    def labels(self) -> np.ndarray | None:
        """Class numbers, int64 [n], or None where an image has none."""
        labels = self.source.labels
        if labels is None or (labels[self.positions] == UNLABELLED).any():
            return None
        return labels[self.positions]

    @property
    def groups(self) -> np.ndarray | None:
        """Group numbers, int64 [n], or None without groups."""
        return None if self.source.groups is None else self.source.groups[self.positions]

    def name(self, i: int) -> str:
        """Name of image i."""
        return self.source.name(int(self.positions[i]))

    def identity(self, i: int) -> str:
        """A key for caches: it changes when the pixels of image i change."""
        file = self.source.identity(int(self.positions[i]))
        depth = self.source.depth
        return file if levels_of(depth) == SIXTEEN_BITS else f"{file} depth {depth}"


class ImageBatch(NamedTuple):
    """B decoded images and the parameters of their views."""

    pixels: Tensor  # rows of all images one after another, uint8 [sum of h * w, 3]
    starts: Tensor  # row of `pixels` where each image begins, int64 [B]
    sizes: Tensor  # height and width of each image in `pixels`, int64 [B, 2]
    table: Tensor  # parameters of the views, float32 [V, B, columns]; boxes in px of these sizes
    epoch: int  # from 0
    batch: int  # number of the batch in its epoch, from 0
    indices: Tensor  # number of each image in the training set, int64 [B]
    bad: list[BadImage]  # images that were replaced, or tried as a replacement, in vain

    def image(self, position: int) -> Tensor:
        """Pixels of one image, uint8 [h, w, 3], a view of the buffer."""
        start = int(self.starts[position])
        height, width = self.sizes[position].tolist()
        return self.pixels[start : start + height * width].view(height, width, 3)


class PixelBuffer:
    """Collects images of different sizes in one buffer.

    In a worker process the buffer is shared memory if there is room, so sending it copies nothing.
    Unused room is never touched and costs nothing.

    Args:
        count: expected number of images.
    """

    def __init__(self, count: int) -> None:
        self._expected = count
        self._pixels = torch.empty((0, 3), dtype=torch.uint8)
        self._sizes: list[tuple[int, int]] = []
        self._end = 0

    def add(self, image: np.ndarray) -> None:
        """Copy an image, uint8 [h, w, 3]."""
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


class TrainingSet(Dataset[ImageBatch]):
    """Maps the key of a batch to decoded images and the parameters of their views; stateless.

    Args:
        images: the training images.
        settings: of the views.
        seed: of the run.
        reduce: decode images no larger than their crops need; False keeps every pixel.
    """

    def __init__(self, images: Subset, settings: ViewSettings, *, seed: int, reduce: bool) -> None:
        self.images, self.settings, self.seed, self.reduce = images, settings, seed, reduce

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    def __getitem__(self, key: BatchKey) -> ImageBatch:
        """Read, decode and pack one batch."""
        source = self.images.source
        if isinstance(source, ArraySource):
            return self._from_memory(source, key)
        buffer, full_sizes, bad = PixelBuffer(len(key.indices)), [], []
        for index in key.indices:
            image, found = self._decode_or_replace(int(index), key.epoch)
            buffer.add(image.pixels)
            full_sizes.append((image.height, image.width, image.reduction))
            bad += found
        heights, widths, reductions = np.array(full_sizes).T
        parameters = self._draw(key.epoch, key.indices, heights, widths)
        pixels, starts, sizes = buffer.packed()
        _reduce_boxes(parameters, reductions, sizes.numpy())
        return _batch(key, pixels, starts, sizes, parameters, bad)

    def _from_memory(self, source: ArraySource, key: BatchKey) -> ImageBatch:
        positions = self.images.positions[key.indices]
        pixels = torch.from_numpy(source.pixels[positions])
        count, height, width, _ = pixels.shape
        sizes = torch.tensor([[height, width]]).expand(count, 2).contiguous()
        starts = torch.arange(count) * (height * width)
        parameters = self._draw(key.epoch, key.indices, sizes[:, 0].numpy(), sizes[:, 1].numpy())
        return _batch(key, pixels.view(-1, 3), starts, sizes, parameters, [])

    def _draw(
        self, epoch: int, indices: np.ndarray, heights: np.ndarray, widths: np.ndarray
    ) -> ViewParameters:
        return draw_parameters(
            self.settings,
            seed=self.seed,
            epoch=epoch,
            indices=indices,
            heights=heights,
            widths=widths,
        )

    def _allowed_reduction(self, index: int, epoch: int, height: int, width: int) -> int:
        """The greatest reduction of an image that leaves all its crops large enough."""
        settings = self.settings
        if not self.reduce or not _may_reduce(settings, height * width):
            return 1
        parameters = self._draw(epoch, np.array([index]), np.array([height]), np.array([width]))
        sides = np.minimum(parameters.height, parameters.width)[:, 0]
        wanted = [settings.size_of(view) for view in range(settings.num_views)]
        return max(1, int((sides / wanted).min() / REDUCING_GAP))

    def _decode_or_replace(self, index: int, epoch: int) -> tuple[DecodedImage, list[BadImage]]:
        """Decode an image; if that fails, another one, drawn by the number of the first."""
        bad: list[BadImage] = []
        candidate = index
        for attempt in range(REPLACEMENT_TRIES):
            try:
                image = self.images.source.decode(
                    int(self.images.positions[candidate]),
                    lambda height, width: self._allowed_reduction(index, epoch, height, width),
                )
            except BadImageError as error:
                bad.append(BadImage(candidate, self.images.name(candidate), str(error)))
                drawn = counter_hash(self.seed, _REPLACE, index, attempt)[0]
                candidate = int(drawn % np.uint64(len(self)))
            else:
                return image, bad
        # The main process sees the list of bad images and ends the run.
        return DecodedImage(np.zeros((1, 1, 3), np.uint8), 1, 1, 1), bad


def _may_reduce(settings: ViewSettings, area: int) -> bool:
    """Whether any draw could allow a reduction; cheaper than drawing."""
    kinds = [(settings.rand_size, settings.rand_scale)]
    if settings.focal_views:
        kinds.append((settings.focal_side, settings.focal_scale))
    return all(math.sqrt(scale[1] * area) >= 2 * REDUCING_GAP * size for size, scale in kinds)


def _reduce_boxes(parameters: ViewParameters, reductions: np.ndarray, sizes: np.ndarray) -> None:
    """Move crop boxes from full to decoded pixels, to the nearest whole ones."""
    table = parameters.table
    for near, far, side in ((0, 2, 0), (1, 3, 1)):
        begin = np.rint(table[..., near] / reductions)
        end = np.rint((table[..., near] + table[..., far]) / reductions)
        end = np.minimum(np.maximum(end, begin + 1), sizes[:, side])
        table[..., near] = np.minimum(begin, end - 1)
        table[..., far] = end - table[..., near]


def _batch(
    key: BatchKey,
    pixels: Tensor,
    starts: Tensor,
    sizes: Tensor,
    parameters: ViewParameters,
    bad: list[BadImage],
) -> ImageBatch:
    table, indices = torch.from_numpy(parameters.table), torch.from_numpy(key.indices)
    return ImageBatch(pixels, starts, sizes, table, key.epoch, key.batch, indices, bad)


class LabelledImages(Dataset[Image.Image]):
    """Labelled images for evaluation; item i is image i at its full size, RGB.

    An unreadable image is replaced by the next readable one of its class, or by a gray one if the
    class has no other; its `info` says so under `REPLACED`, and it is logged once.

    Args:
        images: with labels.
        what: name used in messages.
        strict: whether an unreadable image is an error instead.
        said: whether an image of this name has been logged before.

    Attributes:
        labels: class numbers, LongTensor [n].
        classes: names of the classes.
        groups: group numbers, LongTensor [n], or None without groups.
    """

    def __init__(
        self,
        images: Subset,
        what: str,
        *,
        strict: bool = False,
        said: Callable[[str], bool] | None = None,
    ) -> None:
        labels = images.labels
        if labels is None:
            raise UserError(f"{images.source.where}: has no labels")
        self.images, self.what, self.strict, self._said = images, what, strict, said
        self.labels = torch.from_numpy(labels)
        self.classes = images.source.classes
        self.groups = None if images.groups is None else torch.from_numpy(images.groups)
        # Shared with workers, which are started anew for every pass.
        self._reported = shared_flags(len(labels))

    @property
    def names(self) -> list[str]:
        """Names of the images, in order."""
        return [self.images.name(i) for i in range(len(self))]

    def identity(self, i: int) -> str:
        """A key for caches, see `Source.identity`."""
        return self.images.identity(i)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    def __getitem__(self, i: int) -> Image.Image:
        """Image i, or its replacement.

        Raises:
            UserError: neither it nor twenty others of its class can be read, or `strict` is set.
        """
        try:
            return self._rgb(i)
        except BadImageError as error:
            self._report(i, error)
        alike = torch.nonzero(self.labels == self.labels[i])[:, 0].tolist()
        at = alike.index(i)
        for other in (alike[at + 1 :] + alike[:at])[:REPLACEMENT_TRIES]:
            try:
                image = self._rgb(other)
            except BadImageError as error:
                self._report(other, error)
            else:
                return _replacing(image)
        if len(alike) <= REPLACEMENT_TRIES:
            return _replacing(Image.new("RGB", _GRAY_SIZE, _GRAY))
        name = self.classes[int(self.labels[i])]
        raise UserError(f"{self.images.source.where}: no image of class {name} can be read")

    def _rgb(self, i: int) -> Image.Image:
        return self.images.source.rgb(int(self.images.positions[i]))

    def _report(self, i: int, error: BadImageError) -> None:
        if self.strict:
            raise UserError(strict_message(self.name(i), error))
        if not self._reported[i]:
            self._reported[i] = True
            if self._said is not None and self._said(self.name(i)):
                return
            log.warning("replaced an unreadable %s image: %s (%s)", self.what, self.name(i), error)

    def name(self, i: int) -> str:
        """Name of image i."""
        return self.images.name(i)


def _replacing(image: Image.Image) -> Image.Image:
    image.info[REPLACED] = True  # stays with the image, also out of a worker
    return image
