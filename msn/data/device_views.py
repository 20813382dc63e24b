"""The batched back end: all views of a batch at once, by torch, on the CPU or on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from msn.data.blur import BlurMatrix, blur_taps
from msn.data.collate import ImageBatch
from msn.data.colour import HUE_PLANES, HUE_STEPS, blend, gray_image, turn_hue
from msn.data.crops import choose_kernel, crop
from msn.data.views import (
    COLUMNS,
    CONTRAST,
    HUE,
    IMAGENET_MEAN,
    IMAGENET_STD,
    JITTER_ORDERS,
    SATURATION,
    Views,
    ViewSettings,
)

_CACHED_PIXELS = 1 << 18  # measured best of 2**12 to 2**18, 2-core CPU
_FACTORS = ("brightness", "contrast", "saturation", "hue")  # by their numbers in JITTER_ORDERS
_NOTHING = np.array([1.0, 1.0, 1.0, 0.0], np.float32)  # the factors that change nothing


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
    rand, blur = 1 + settings.rand_views, settings.blur_radius[1]
    large = _make(batch, slice(0, rand), settings.rand_size, kernel, blur).to(dtype)
    small = _make(batch, slice(rand, None), settings.focal_size, kernel, blur).to(dtype)
    return Views(target=large[0], rand=large[1:], focal=small)


def _make(batch: ImageBatch, views: slice, size: int, kernel: str, greatest_blur: float) -> Tensor:
    table = batch.table[views]
    shape = (*table.shape[:2], 3, size, size)
    device = batch.pixels.device
    if table.shape[0] == 0:
        return torch.empty(shape, device=device)
    # Pillow rounds between its steps, so whole numbers go through all of them.
    pixels = crop(batch, views, size, kernel).float().round_().view(-1, 3, size, size)
    rows = table.reshape(-1, len(COLUMNS))
    matrix = BlurMatrix(size, greatest_blur, device)
    # On a CPU a change is cheap only while its pixels stay in the cache.
    step = len(pixels) if pixels.is_cuda else max(1, _CACHED_PIXELS // size**2)
    for at in range(0, len(pixels), step):
        part = rows[at : at + step]
        _recolour(pixels[at : at + step], dict(zip(COLUMNS, part.unbind(-1), strict=True)), matrix)
    mean, std = (torch.tensor(v, device=device) for v in (IMAGENET_MEAN, IMAGENET_STD))
    scale = 1 / (255 * std)
    return pixels.mul_(scale.view(3, 1, 1)).sub_((mean / std).view(3, 1, 1)).view(shape)


def _recolour(pixels: Tensor, columns: dict[str, Tensor], matrix: BlurMatrix) -> None:
    """Jitter, gray and blur of views [n, 3, S, S], in place."""
    _jitter(pixels, columns)
    _change(pixels, columns["gray"] > 0, lambda part, _: part.copy_(_gray(part)))

    def blur(part: Tensor, rows: Tensor) -> None:
        taps = torch.from_numpy(blur_taps(columns["blur"][rows].numpy(), matrix.greatest))
        across = matrix(taps.to(part.device, non_blocking=True)).unsqueeze(1)  # [n, 1, S, S]
        torch.round(across @ part @ across.mT, out=part)

    _change(pixels, columns["blur"] > 0, blur)


def _jitter(pixels: Tensor, columns: dict[str, Tensor]) -> None:
    """Brightness, contrast, saturation and hue in each view's own order, in place."""
    orders = JITTER_ORDERS[columns["order"].numpy().astype(np.int64)]  # [n, 4]
    factors = np.stack([columns[name].numpy() for name in _FACTORS], -1)  # [n, 4]
    happens = np.take_along_axis(factors, orders, 1) != _NOTHING[orders]
    for position in range(orders.shape[1]):
        for change in np.unique(orders[happens[:, position], position]).tolist():

            def apply(part: Tensor, rows: Tensor, change: int = change) -> None:
                factor = torch.from_numpy(factors[rows.numpy(), change])
                _apply(part, change, factor.to(part.device, non_blocking=True))

            mask = happens[:, position] & (orders[:, position] == change)
            _change(pixels, torch.from_numpy(mask), apply)


def _apply(part: Tensor, change: int, factor: Tensor) -> None:
    """One change of [n, 3, S, S] by factors [n], in place."""
    if change == HUE:
        turns = (factor * HUE_STEPS).trunc() / HUE_STEPS  # as Pillow cuts them
        scratch = part.new_empty(HUE_PLANES, part.shape[0], *part.shape[2:])
        turn_hue(part, turns.view(-1, 1, 1), scratch)
        return
    base: Tensor | float = 0.0
    if change == CONTRAST:
        # Pillow's mean gray is a whole number.
        base = (_gray(part).mean(dim=(-1, -2), keepdim=True) + 0.5).floor_()
    elif change == SATURATION:
        base = _gray(part)
    blend(part, base, factor.view(-1, 1, 1, 1))


def _gray(part: Tensor) -> Tensor:
    return gray_image(part).unsqueeze(-3)  # [n, 1, S, S]


def _change(pixels: Tensor, mask: Tensor, change: Callable[[Tensor, Tensor], object]) -> None:
    """Take the views of a mask (on the CPU, so nothing waits for the device), change, put back."""
    rows = torch.nonzero(mask)[:, 0]
    if len(rows) == 0:
        return
    index = rows.to(pixels.device, non_blocking=True)
    part = pixels if len(rows) == len(pixels) else pixels.index_select(0, index)
    change(part, rows)
    if part is not pixels:
        pixels.index_copy_(0, index, part)
