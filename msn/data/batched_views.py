"""The batched back end: all views of a batch at once, by torch, on the CPU or on another device.

Crops are antialiased with Pillow's support, a triangle as wide as the reduction: by torch's own
kernels one after the other (`crop_each`), and of small images by two matrix products for all crops
at once (`crop_together`). Views with the same change are then changed together. CUDA has
`msn.data.cuda_views`. Measurements are in `benchmarks/data.md`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from msn.compilers import missing_compiler
from msn.data.colour import (
    HUE_STEPS,
    blend,
    blur_matrices,
    blur_taps,
    gray_image,
    mean_gray,
    turn_hue,
)
from msn.data.dataset import ImageBatch
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

_CACHED_PIXELS = 1 << 18  # measured best of 2**12 to 2**18, 2-core CPU
_TOGETHER_UP_TO = 64  # px
_TOGETHER = 256  # images at a time, which bounds memory


def choose_kernel(batch: ImageBatch) -> str:
    """The kernel for a batch's device and image sizes; on a CPU the one that measured fastest."""
    device = batch.pixels.device
    if device.type == "cuda" and _can_compile():
        return "cuda"
    if int(batch.sizes.max()) <= _TOGETHER_UP_TO and bool((batch.sizes == batch.sizes[0]).all()):
        return "together"
    return "rounded" if device.type == "cpu" else "each"


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
        kernel: `each` (crops one at a time), `rounded` (the same by torch's uint8 kernel, CPU only,
            to whole gray levels), `together` (crops of images of one size by matrix products) or
            `cuda` (`msn.data.cuda_views`); None chooses.

    Returns:
        Normalised views.
    """
    kernel = choose_kernel(batch) if kernel is None else kernel
    if kernel == "cuda":
        from msn.data.cuda_views import make_cuda_views  # where there is Triton

        return make_cuda_views(batch, settings, dtype=dtype)
    rand, blur = 1 + settings.rand_views, settings.blur_radius[1]

    def make(views: slice, size: int) -> Tensor:
        return _make(batch, views, size, kernel=kernel, greatest_blur=blur).to(dtype)

    large = make(slice(0, rand), settings.rand_size)
    small = make(slice(rand, None), settings.focal_side)
    return Views(target=large[0], rand=large[1:], focal=small)


def _make(
    batch: ImageBatch, views: slice, size: int, *, kernel: str, greatest_blur: float
) -> Tensor:
    table = batch.table[views]
    shape = (*table.shape[:2], 3, size, size)
    device = batch.pixels.device
    if table.shape[0] == 0:
        return torch.empty(shape, device=device)
    if kernel == "together":
        pixels = crop_together(batch, views, size)
    else:
        pixels = crop_each(batch, views, size, rounded=kernel == "rounded")
    pixels = pixels.view(-1, 3, size, size)
    rows = table.reshape(-1, len(COLUMNS))
    # On a CPU a change is cheap only while its pixels stay in the cache.
    step = max(1, _CACHED_PIXELS // size**2) if device.type == "cpu" else len(pixels)
    for part, of in zip(pixels.split(step), rows.split(step), strict=True):
        _recolour(part, dict(zip(COLUMNS, of.unbind(-1), strict=True)), greatest_blur)
    scale, shift = _normalisation(device)
    return pixels.mul_(scale).sub_(shift).view(shape)


@cache
def _normalisation(device: torch.device) -> tuple[Tensor, Tensor]:
    """Scale and shift that normalise values 0 to 255, copied to the device only once."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (1 / (255 * std)).to(device), (mean / std).to(device)


def _recolour(pixels: Tensor, columns: dict[str, Tensor], greatest_blur: float) -> None:
    """Jitter, gray and blur of views [n, 3, S, S], in place."""
    _jitter(pixels, columns)
    _change(pixels, columns["gray"] > 0, lambda part, _: part.copy_(gray_image(part)))

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
        turn_hue(part, (factor * HUE_STEPS).trunc() / HUE_STEPS)
    elif change == CONTRAST:
        blend(part, mean_gray(part), factor)
    elif change == SATURATION:
        blend(part, gray_image(part), factor)
    else:
        blend(part, None, factor)


def _change(pixels: Tensor, mask: Tensor, change: Callable[[Tensor, Tensor], object]) -> None:
    """Change the views of a mask in place; the mask is on the CPU, so nothing waits."""
    rows = torch.nonzero(mask)[:, 0]
    if len(rows) == 0:
        return
    index = rows.to(pixels.device, non_blocking=True)
    part = pixels if len(rows) == len(pixels) else pixels.index_select(0, index)
    change(part, rows)
    if part is not pixels:
        pixels.index_copy_(0, index, part)


def crop_each(batch: ImageBatch, views: slice, size: int, *, rounded: bool) -> Tensor:
    """Crop, resize and flip the views of a batch one by one.

    Args:
        batch: decoded images; the table on the CPU, the pixels on any device.
        views: which rows of the table; all become `size` px.
        size: side of the result in px.
        rounded: whole gray levels by torch's uint8 kernel, which the CPU alone has; faster.

    Returns:
        Values 0 to 255, float32 [v, B, 3, size, size].
    """
    table, device = batch.table[views], batch.pixels.device
    shape = (*table.shape[:2], 3, size, size)
    # NumPy asks the kernel for huge pages; the first touch of others takes a third of all the time.
    on_cpu = device.type == "cpu"
    out = (
        torch.from_numpy(np.empty(shape, np.float32))
        if on_cpu
        else torch.empty(shape, device=device)
    )
    boxes = table[..., :5].long().tolist()
    for item in range(table.shape[1]):  # all views of an image while it is in the cache
        image = batch.image(item)
        for view in range(len(table)):
            top, left, height, width, flip = boxes[view][item]
            # Interleaved pixels have the fast kernel.
            part = image[top : top + height, left : left + width].contiguous().permute(2, 0, 1)
            part = part[None] if rounded else part[None].float()
            resized = F.interpolate(part, size=(size, size), mode="bilinear", antialias=True)[0]
            out[view, item] = resized.flip(-1) if flip else resized
    return out


def crop_together(batch: ImageBatch, views: slice, size: int) -> Tensor:
    """As `crop_each`, not rounded, for images of one size: two matrix products for all crops.

    Most entries of the matrices are zero, so this is fast for small images alone.
    """
    (height, width), count = batch.sizes[0].tolist(), len(batch.sizes)
    images = batch.pixels.view(count, height, width, 3).transpose(2, 3)  # rows of planes
    images = images.to(torch.float32, memory_format=torch.contiguous_format)
    boxes = batch.table[views, :, :5].transpose(0, 1)  # [B, v, 5]
    pairs = zip(images.split(_TOGETHER), boxes.split(_TOGETHER), strict=True)
    parts = [_resample(*pair, size) for pair in pairs]
    return torch.cat(parts).permute(1, 0, 3, 2, 4).contiguous()


def _resample(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Crops of images [n, h, 3, w] by boxes [n, v, 5] on the CPU, [n, v, size, 3, size]."""
    count, height, _, width = images.shape
    num_views = boxes.shape[1]
    flat = boxes.reshape(-1, 5)
    scale = float(flat[:, 2:4].max()) / size
    taps = 2 * math.ceil(max(scale, 1.0)) + 1
    top, left, high, wide, flip = flat.to(images.device, non_blocking=True).unbind(-1)
    down = _resampling_matrices(top, high, None, size=size, span=height, taps=taps)
    across = _resampling_matrices(left, wide, flip, size=size, span=width, taps=taps)
    rows = down.view(count, num_views * size, height) @ images.view(count, height, 3 * width)
    rows = rows.view(count * num_views, size * 3, width)
    return torch.bmm(rows, across.transpose(1, 2)).view(count, num_views, size, 3, size)


def _resampling_matrices(
    begin: Tensor, length: Tensor, flip: Tensor | None, *, size: int, span: int, taps: int
) -> Tensor:
    """Matrices that resample `length` pixels from `begin` on to `size` pixels, Pillow's triangle.

    Args:
        begin: first pixel of each box within the span, float [n].
        length: pixels of each box, float [n].
        flip: 1 where the result is mirrored, float [n]; None for nowhere.
        size: pixels of the result.
        span: pixels of the input row.
        taps: upper bound on the pixels of the input that a pixel of the result needs.

    Returns:
        float32 [n, size, span], each row sums to 1.
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
    dense = weights.new_zeros(len(begin), size, span)
    return dense.scatter_(-1, places.long().permute(1, 2, 0), weights.permute(1, 2, 0))
