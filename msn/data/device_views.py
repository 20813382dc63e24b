"""The batched back end: all views of a batch at once, by torch, on the CPU or on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from msn.data.blur import BlurMatrix, blur_taps
from msn.data.collate import ImageBatch
from msn.data.colour import HUE_PLANES, HUE_STEPS, blend, gray_image, turn_hue
from msn.data.crops import choose_kernel, crop
from msn.data.views import (
    BRIGHTNESS,
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

_FACTORS = {BRIGHTNESS: "brightness", CONTRAST: "contrast", SATURATION: "saturation", HUE: "hue"}


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
    if table.shape[0] == 0:
        return torch.empty(shape, device=batch.pixels.device)
    # Pillow rounds between its steps, so whole numbers go through all of them.
    pixels = crop(batch, views, size, kernel).float().round_().view(-1, 3, size, size)
    columns = dict(zip(COLUMNS, table.reshape(-1, len(COLUMNS)).unbind(-1), strict=True))
    _jitter(pixels, columns)
    _change(pixels, columns["gray"] > 0, lambda part, _: part.copy_(_gray(part)))
    matrix = BlurMatrix(size, greatest_blur, pixels.device)

    def blur(part: Tensor, rows: Tensor) -> None:
        taps = torch.from_numpy(blur_taps(columns["blur"][rows].numpy(), greatest_blur))
        across = matrix(taps.to(part.device, non_blocking=True)).unsqueeze(1)  # [n, 1, S, S]
        part.copy_((across @ part @ across.mT).round_())

    _change(pixels, columns["blur"] > 0, blur)
    mean, std = (torch.tensor(v, device=pixels.device) for v in (IMAGENET_MEAN, IMAGENET_STD))
    scale = 1 / (255 * std)
    return pixels.mul_(scale.view(3, 1, 1)).sub_((mean / std).view(3, 1, 1)).view(shape)


def _jitter(pixels: Tensor, columns: dict[str, Tensor]) -> None:
    """Brightness, contrast, saturation and hue in each view's own order, in place."""
    orders = torch.from_numpy(JITTER_ORDERS)[columns["order"].long()]  # [n, 4]
    for position in range(orders.shape[1]):
        for change, name in _FACTORS.items():
            factors = columns[name]
            happens = factors != (0 if change == HUE else 1)

            def apply(
                part: Tensor, rows: Tensor, change: int = change, f: Tensor = factors
            ) -> None:
                factor = f[rows].to(part.device, non_blocking=True)
                _apply(part, change, factor)

            _change(pixels, happens & (orders[:, position] == change), apply)


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
