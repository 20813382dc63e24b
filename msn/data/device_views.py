"""The batched back end: all views of a batch at once, by torch, on the CPU or on a GPU."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

from msn.compilers import missing_compiler
from msn.data.blur import blur_matrices, blur_taps
from msn.data.collate import ImageBatch
from msn.data.colour import (
    HUE_PLANES,
    blend,
    channels_of,
    gray_image,
    mean_gray,
    turn_hue,
    whole_turns,
)
from msn.data.crops import crop
from msn.data.host_views import make_chunk_by_chunk
from msn.data.views import (
    COLUMNS,
    CONTRAST,
    FACTORS,
    HUE,
    IMAGENET_MEAN,
    IMAGENET_STD,
    JITTER_ORDERS,
    NO_CHANGE,
    SATURATION,
    Views,
    ViewSettings,
)

log = logging.getLogger(__name__)

KERNELS = ("native", "whole", "cuda")
_CACHED_PIXELS = 1 << 18  # measured best of 2**12 to 2**18, 2-core CPU
_WHOLE_UP_TO = 64  # px


def choose_kernel(batch: ImageBatch) -> str:
    """The kernel for a batch's device and image sizes; on a CPU the one that measured fastest."""
    device = batch.pixels.device
    if device.type == "cuda" and _can_compile():
        return "cuda"
    height, width = batch.sizes[0].tolist()
    same = bool((batch.sizes == batch.sizes[0]).all())
    small = same and max(height, width) <= _WHOLE_UP_TO
    return "whole" if small or device.type != "cpu" else "native"


@cache
def _can_compile() -> bool:
    if missing := missing_compiler("cuda"):
        log.warning("views: there is no %s; without it they take several times longer", missing)
    return missing is None


def make_batched_views(
    batch: ImageBatch, settings: ViewSettings, *, dtype: torch.dtype, kernel: str | None = None
) -> Views:
    """Make the views of a batch on the device that holds its pixels.

    Args:
        batch: decoded images with parameters; the tables on the CPU.
        settings: of the views.
        dtype: of the views.
        kernel: `native` (some views at a time, CPU only), `whole` (all together, by products of
            matrices) or `cuda` (`msn.data.cuda_views`); None chooses.

    Returns:
        Normalised views.
    """
    kernel = choose_kernel(batch) if kernel is None else kernel
    if kernel == "cuda":
        from msn.data.cuda_views import make_cuda_views  # where there is Triton

        return make_cuda_views(batch, settings, dtype=dtype)
    rand, blur = 1 + settings.rand_views, settings.blur_radius[1]

    def make(views: slice, size: int) -> Tensor:
        if kernel == "native":
            return make_chunk_by_chunk(batch, views, size, greatest_blur=blur).to(dtype)
        return _make_together(batch, views, size, greatest_blur=blur).to(dtype)

    large = make(slice(0, rand), settings.rand_size)
    small = make(slice(rand, None), settings.focal_size)
    return Views(target=large[0], rand=large[1:], focal=small)


def _make_together(batch: ImageBatch, views: slice, size: int, *, greatest_blur: float) -> Tensor:
    table = batch.table[views]
    shape = (*table.shape[:2], 3, size, size)
    device = batch.pixels.device
    if table.shape[0] == 0:
        return torch.empty(shape, device=device)
    pixels = crop(batch, views, size).view(-1, 3, size, size)
    rows = table.reshape(-1, len(COLUMNS))
    # On a CPU a change is cheap only while its pixels stay in the cache.
    step = max(1, _CACHED_PIXELS // size**2) if device.type == "cpu" else len(pixels)
    for at in range(0, len(pixels), step):
        part = rows[at : at + step]
        columns = dict(zip(COLUMNS, part.unbind(-1), strict=True))
        _recolour(pixels[at : at + step], columns, greatest_blur)
    scale, shift = _normalisation(device)
    return pixels.mul_(scale).sub_(shift).view(shape)


@cache
def _normalisation(device: torch.device) -> tuple[Tensor, Tensor]:
    """Factor of values 0 to 255 and what is then taken off; copied to the device only once."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (1 / (255 * std)).to(device), (mean / std).to(device)


def _recolour(pixels: Tensor, columns: dict[str, Tensor], greatest_blur: float) -> None:
    """Jitter, gray and blur of views [n, 3, S, S], in place."""
    _jitter(pixels, columns)
    _change(pixels, columns["gray"] > 0, lambda part, _: part.copy_(gray_image(channels_of(part))))

    def blur(part: Tensor, rows: Tensor) -> None:
        taps = torch.from_numpy(blur_taps(columns["blur"][rows].numpy(), greatest_blur))
        taps = taps.to(part.device, non_blocking=True)
        across = blur_matrices(taps, part.shape[-1]).unsqueeze(1)  # [n, 1, S, S]
        part.copy_(across @ part @ across.mT)

    _change(pixels, columns["blur"] > 0, blur)


def _jitter(pixels: Tensor, columns: dict[str, Tensor]) -> None:
    """Brightness, contrast, saturation and hue in each view's own order, in place."""
    orders = JITTER_ORDERS[columns["order"].numpy().astype(np.int64)]  # [n, 4]
    factors = np.stack([columns[COLUMNS[number]].numpy() for number in FACTORS], -1)  # [n, 4]
    happens = np.take_along_axis(factors, orders, 1) != NO_CHANGE[orders]
    for position in range(orders.shape[1]):
        for change in np.unique(orders[happens[:, position], position]).tolist():

            def apply(part: Tensor, rows: Tensor, change: int = change) -> None:
                factor = torch.from_numpy(factors[rows.numpy(), change])
                _apply(part, change, factor.to(part.device, non_blocking=True))

            mask = happens[:, position] & (orders[:, position] == change)
            _change(pixels, torch.from_numpy(mask), apply)


def _apply(part: Tensor, change: int, factor: Tensor) -> None:
    """One change of [n, 3, S, S] by factors float32 [n], in place."""
    factor = factor.view(-1, 1, 1, 1)
    if change == HUE:
        scratch = part.new_empty(HUE_PLANES, len(part), 1, *part.shape[2:]).unbind()
        turn_hue(part, channels_of(part), whole_turns(factor), scratch)
        return
    base: Tensor | float = 0.0
    if change == CONTRAST:
        base = mean_gray(part)
    elif change == SATURATION:
        base = gray_image(channels_of(part))
    blend(part, base, factor)


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
