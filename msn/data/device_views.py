"""The batched back end: all views of a batch at once, by torch, on the CPU or on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from msn.data.blur import blur
from msn.data.collate import ImageBatch
from msn.data.colour import jitter, to_gray
from msn.data.crops import choose_kernel, crop
from msn.data.views import COLUMNS, IMAGENET_MEAN, IMAGENET_STD, Views, ViewSettings


def make_batched_views(
    batch: ImageBatch, settings: ViewSettings, *, dtype: torch.dtype, kernel: str | None = None
) -> Views:
    """Make the views of a batch on the device that holds its pixels.

    Args:
        batch: decoded images with parameters; the tables on the CPU.
        settings: of the views.
        dtype: of the views.
        kernel: how to crop, see `msn.data.crops.crop`; None chooses.

    Returns:
        Normalised views.
    """
    kernel = choose_kernel(batch) if kernel is None else kernel
    rand = 1 + settings.rand_views
    large = _make(batch, slice(0, rand), settings.rand_size, kernel, dtype)
    small = _make(batch, slice(rand, None), settings.focal_size, kernel, dtype)
    return Views(target=large[0], rand=large[1:], focal=small)


def _make(batch: ImageBatch, views: slice, size: int, kernel: str, dtype: torch.dtype) -> Tensor:
    table = batch.table[views]
    shape = (*table.shape[:2], 3, size, size)
    pixels = crop(batch, views, size, kernel).float().view(-1, 3, size, size)
    columns = dict(zip(COLUMNS, table.reshape(-1, len(COLUMNS)).unbind(-1), strict=True))
    pixels = jitter(pixels, columns)
    rows = torch.nonzero(columns["gray"])[:, 0]
    if len(rows):
        pixels[rows] = to_gray(pixels[rows]).expand(-1, 3, -1, -1)
    rows = torch.nonzero(columns["blur"])[:, 0]
    if len(rows):
        pixels[rows] = blur(pixels[rows], columns["blur"][rows])
    mean, std = (torch.tensor(v, device=pixels.device) for v in (IMAGENET_MEAN, IMAGENET_STD))
    scale = (1 / (255 * std)).view(3, 1, 1)
    return torch.addcmul((-mean / std).view(3, 1, 1), pixels, scale).to(dtype).view(shape)
