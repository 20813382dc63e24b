"""Antialiased crops of many images at once: bilinear with Pillow's support, by two kernels.

Both resample with a triangle as wide as the reduction, as Pillow and torchvision do, and agree up
to rounding: on a CPU torch's uint8 kernel one crop after the other (`resize`), and for small images
two matrix products for all crops of an image at once (`crop`). CUDA has `msn.data.cuda_views`. What
was measured stands in `benchmarks/data.md`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from msn.data.collate import ImageBatch

_CHUNK_BYTES = 1 << 28  # of images, weights and half-made crops at a time
_LONGEST = 8  # times the short side; crops of a longer image are small beside it


def crop(batch: ImageBatch, views: slice, size: int) -> Tensor:
    """Crop, resize and flip the views of a batch.

    All views of an image come out of its whole picture by two products of matrices, most of whose
    entries are zero.
    Images of different sizes are padded, those of like shape together.

    Args:
        batch: decoded images; table and sizes on the CPU, the pixels on any device.
        views: which rows of the table; all become `size` px.
        size: side of the result in px.

    Returns:
        Values 0 to 255, not rounded, float32 [v, B, 3, size, size].
    """
    table = batch.table[views]
    num_views, count = table.shape[:2]
    parts, order = [], []
    for numbers in _chunks(batch.sizes.numpy(), num_views * size):
        images = _padded(batch, numbers)  # [n, h, 3, w]
        boxes = table[:, numbers, :5].transpose(0, 1)  # [n, v, 5]
        low, high = sorted(batch.sizes[numbers[0]].tolist())
        apart = len(numbers) == 1 and high > _LONGEST * low
        resample = _resample_apart if apart else _resample
        parts.append(resample(images, boxes, size).permute(1, 0, 3, 2, 4))
        order.append(numbers)
    places = torch.from_numpy(np.concatenate(order))
    if len(parts) == 1 and bool((places == torch.arange(count)).all()):
        return parts[0].contiguous()
    out = parts[0].new_empty(num_views, count, 3, size, size)
    places = places.to(out.device, non_blocking=True)
    for part, place in zip(parts, places.split([len(numbers) for numbers in order]), strict=True):
        out.index_copy_(1, place, part)
    return out


def _chunks(sizes: np.ndarray, rows: int) -> Iterator[np.ndarray]:
    """Numbers of images that are cropped together: of like shape, and few enough for the memory.

    Args:
        sizes: heights and widths, int64 [B, 2].
        rows: that the crops of an image have together.
    """
    heights, widths = sizes.T
    order = np.lexsort((heights * widths, heights > widths))
    begin, height, width = 0, 0, 0
    for at, number in enumerate(order.tolist()):
        height, width = max(height, sizes[number, 0]), max(width, sizes[number, 1])
        values = 3 * height * width + rows * (4 * width + height)
        if at > begin and (at + 1 - begin) * values * 4 > _CHUNK_BYTES:
            yield order[begin:at]
            begin, (height, width) = at, sizes[number]
    if begin < len(order):
        yield order[begin:]


def _padded(batch: ImageBatch, numbers: np.ndarray) -> Tensor:
    """The images with these numbers, rows of planes, [n, h, 3, w]; what is added is arbitrary."""
    device, sizes = batch.pixels.device, batch.sizes[numbers]
    height, width = sizes.amax(0).tolist()
    if bool((sizes == sizes.new_tensor([height, width])).all()) and (np.diff(numbers) == 1).all():
        begin = int(batch.starts[numbers[0]])
        images = batch.pixels[begin : begin + len(numbers) * height * width]
        images = images.view(-1, height, width, 3)
    else:
        high, wide = sizes.to(device, non_blocking=True).unbind(-1)
        starts = batch.starts[numbers].to(device, non_blocking=True)
        down = torch.arange(height, device=device).minimum(high[:, None] - 1)
        across = torch.arange(width, device=device).minimum(wide[:, None] - 1)
        lines = starts[:, None] + down * wide[:, None]
        images = batch.pixels[lines[:, :, None] + across[:, None]]
    return images.transpose(2, 3).to(torch.float32, memory_format=torch.contiguous_format)


def _resample(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Crops of images [n, h, 3, w] by boxes [n, v, 5] on the CPU, [n, v, size, 3, size]."""
    count, height, _, width = images.shape
    num_views = boxes.shape[1]
    flat = boxes.reshape(-1, 5)
    scale = float(flat[:, 2:4].max()) / size
    top, left, high, wide, flip = flat.to(images.device, non_blocking=True).unbind(-1)
    taps = 2 * math.ceil(max(scale, 1.0)) + 1

    def weights(begin: Tensor, length: Tensor, flip: Tensor | None, span: int) -> Tensor:
        taken, places = resampling_weights(begin, length, flip, size=size, span=span, taps=taps)
        dense = images.new_zeros(len(flat), size, span)
        return dense.scatter_(-1, places, taken)

    down = weights(top, high, None, height).view(count, num_views * size, height)
    rows = down @ images.view(count, height, 3 * width)  # [n, v * size, 3 * w]
    across = weights(left, wide, flip, width)  # [n * v, size, w]
    rows = rows.view(count * num_views, size * 3, width)
    return torch.bmm(rows, across.transpose(1, 2)).view(count, num_views, size, 3, size)


def _resample_apart(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """As `_resample` for one image, each crop by itself: most of a very long image is in none."""
    parts = []
    for top, left, high, wide, flip in boxes[0].long().tolist():
        part = images[:, top : top + high, :, left : left + wide].contiguous()
        parts.append(_resample(part, boxes.new_tensor([[[0, 0, high, wide, flip]]]), size))
    return torch.cat(parts, dim=1)


def resize(part: np.ndarray, size: int) -> Tensor:
    """Resize a part of an image by torch's own uint8 kernel, on the CPU.

    Args:
        part: uint8 [h, w, 3], need not be contiguous.
        size: side of the result in px.

    Returns:
        uint8 [3, size, size].
    """
    # Views are taken in NumPy, where they cost a tenth; interleaved pixels have the fast kernel.
    planes = torch.from_numpy(np.ascontiguousarray(part)[None].transpose(0, 3, 1, 2))
    return F.interpolate(planes, size=(size, size), mode="bilinear", antialias=True)[0]


def resampling_weights(
    begin: Tensor, length: Tensor, flip: Tensor | None, *, size: int, span: int, taps: int
) -> tuple[Tensor, Tensor]:
    """Weights that resample `length` pixels from `begin` on to `size` pixels, Pillow's triangle.

    Args:
        begin: first pixel of each box within the span, float [n].
        length: pixels of each box, float [n].
        flip: 1 where the result runs backwards, float [n]; None for nowhere.
        size: pixels of the result.
        span: pixels of the input row that the weights are for.
        taps: no pixel of the result needs more pixels of the input.

    Returns:
        Weights and the pixels that they are for, float32 and int64 [n, size, min(taps, span)];
        the weights of a row sum to 1.
    """
    taps = min(taps, span)
    steps = torch.arange(size, device=begin.device, dtype=torch.float32) + 0.5
    if flip is not None:
        steps = torch.where(flip[:, None] > 0, size - steps, steps)
    begin, length = begin[:, None], length[:, None]
    scale = length / size
    centres = begin + steps * scale  # [n, size]
    reach = scale.clamp(min=1)
    first = (centres - reach).floor_().clamp_(0, span - taps)
    # The short axis of taps comes first: on a CPU passes along a short last one are slow.
    places = first + torch.arange(taps, device=begin.device).view(-1, 1, 1)  # [taps, n, size]
    pixels = places + 0.5
    weights = (1 - (pixels - centres).abs_().div_(reach)).clamp_(min=0)
    weights *= (pixels > begin) & (pixels < begin + length)  # a crop does not see beyond its box
    weights /= weights.sum(0)
    return weights.permute(1, 2, 0), places.long().permute(1, 2, 0)
