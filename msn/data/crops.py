"""Antialiased crops of many images at once: bilinear with Pillow's support, by three kernels.

All three resample with a triangle as wide as the reduction, as Pillow and torchvision do, and agree
up to rounding. Which is fastest depends on the device and the images (`benchmarks/data.md`).
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from msn.data.collate import ImageBatch

KERNELS = ("native", "whole", "padded")


def choose_kernel(batch: ImageBatch) -> str:
    """The kernel that measured fastest for a batch's device and image sizes."""
    if batch.pixels.is_cuda:
        return "padded"
    height, width = batch.sizes[0].tolist()
    same = bool((batch.sizes == batch.sizes[0]).all())
    return "whole" if same and max(height, width) <= _WHOLE_UP_TO else "native"


_WHOLE_UP_TO = 64  # px
_PADDED_BYTES = 1 << 28  # of float pixels gathered at a time
_PADDED_TO = 32  # px; few different shapes keep a compiled graph from being built again


def crop(batch: ImageBatch, views: slice, size: int, kernel: str) -> Tensor:
    """Crop, resize and flip the views of a batch.

    Args:
        batch: decoded images; the table on the CPU, the pixels on any device.
        views: which rows of the table; all become `size` px.
        size: side of the result in px.
        kernel: `whole` (two matrix products over whole images of one size) or `padded` (two matrix
            products over crops gathered from images of any size).

    Returns:
        Values 0 to 255, not rounded, float32 [v, B, 3, size, size].
    """
    table = batch.table[views]
    if kernel == "whole":
        return _whole(batch, table, size)
    return _padded(batch, table, size)


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
    begin: Tensor, length: Tensor, flip: Tensor | None, *, size: int, span: int
) -> Tensor:
    """Weights that resample `length` pixels from `begin` on to `size` pixels, Pillow's triangle.

    Args:
        begin: first pixel of each box within the span, float [n].
        length: pixels of each box, float [n].
        flip: 1 where the result runs backwards, float [n]; None for nowhere.
        size: pixels of the result.
        span: pixels of the input row that the weights are for.

    Returns:
        Rows that sum to 1, float32 [n, size, span].
    """
    steps = torch.arange(size, device=begin.device, dtype=torch.float32) + 0.5
    if flip is not None:
        steps = torch.where(flip[:, None] > 0, size - steps, steps)
    begin, length = begin[:, None], length[:, None]
    scale = length / size
    centres = begin + steps * scale  # [n, size]
    pixels = torch.arange(span, device=begin.device, dtype=torch.float32) + 0.5
    distance = (pixels - centres[..., None]).abs_()  # [n, size, span]
    weights = (1 - distance / scale.clamp(min=1)[..., None]).clamp_(min=0)
    inside = (pixels > begin) & (pixels < begin + length)  # a crop does not see beyond its box
    weights *= inside[:, None]
    return weights / weights.sum(-1, keepdim=True)


def _whole(batch: ImageBatch, table: Tensor, size: int) -> Tensor:
    height, width = batch.sizes[0].tolist()
    count, device = len(batch.sizes), batch.pixels.device
    images = batch.pixels.view(count, height, width, 3).permute(0, 3, 1, 2).float()
    box = table[..., :5].to(device, non_blocking=True)
    top, left, high, wide, flip = box.unbind(-1)  # [v, B] each
    shape = (*table.shape[:2], size)
    flat = [t.reshape(-1) for t in (top, left, high, wide, flip)]
    down = resampling_weights(flat[0], flat[2], None, size=size, span=height)
    across = resampling_weights(flat[1], flat[3], flat[4], size=size, span=width)
    down, across = down.view(*shape, height), across.view(*shape, width)
    return down[:, :, None] @ (images @ across.transpose(-1, -2)[:, :, None])


def _padded(batch: ImageBatch, table: Tensor, size: int) -> Tensor:
    """Gather every crop into a box of one size, then resample all of them at once."""
    num_views, count = table.shape[:2]
    device = batch.pixels.device
    high = _round_up(int(table[..., 2].max()))
    wide = _round_up(int(table[..., 3].max()))
    box = table[..., :5].reshape(-1, 5).to(device, non_blocking=True)
    starts = batch.starts.to(device, non_blocking=True).repeat(num_views)
    widths = batch.sizes[:, 1].to(device, non_blocking=True).repeat(num_views)
    out = torch.empty((num_views * count, 3, size, size), device=device)
    step = max(1, _PADDED_BYTES // (high * wide * 12))
    for at in range(0, len(box), step):
        part = slice(at, at + step)
        out[part] = _gather_and_resample(
            batch.pixels, starts[part], widths[part], box[part], (high, wide, size)
        )
    return out.view(num_views, count, 3, size, size)


def _gather_and_resample(
    pixels: Tensor, starts: Tensor, widths: Tensor, box: Tensor, shape: tuple[int, int, int]
) -> Tensor:
    high, wide, size = shape
    top, left, height, width, flip = box.unbind(-1)
    rows = torch.arange(high, device=box.device)[None].minimum(height.long()[:, None] - 1)
    columns = torch.arange(wide, device=box.device)[None].minimum(width.long()[:, None] - 1)
    line = starts[:, None] + (rows + top.long()[:, None]) * widths[:, None]
    where = line[:, :, None] + (columns + left.long()[:, None])[:, None]  # [n, high, wide]
    crops = pixels[where].permute(0, 3, 1, 2).float()
    zero = torch.zeros_like(top)
    down = resampling_weights(zero, height, None, size=size, span=high)
    across = resampling_weights(zero, width, flip, size=size, span=wide)
    return down[:, None] @ (crops @ across.transpose(-1, -2)[:, None])


def _round_up(pixels: int) -> int:
    return -(-pixels // _PADDED_TO) * _PADDED_TO
