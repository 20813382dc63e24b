"""The batched back end on CUDA: five kernels per size of views, for any batch.

Views are made straight from the packed pixels, so images of any sizes need no padding: crops as in
`msn.data.batched_views`, colours and blur as in `msn.data.colour`. Each view has its own order of
changes; contrast needs the mean gray after all changes before it, hence a pass of its own. The
arithmetic is float32; between the kernels pixels are float16 if the views have 16 bits.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from msn.data.colour import CUT, HUE_STEPS, LUMA, blur_taps
from msn.data.dataset import ImageBatch
from msn.data.views import (
    BRIGHTNESS,
    COLUMNS,
    CONTRAST,
    FACTORS,
    HUE,
    IMAGENET_MEAN,
    IMAGENET_STD,
    JITTER_ORDERS,
    SATURATION,
    Views,
    ViewSettings,
)

_TILE = (8, 32)  # px of a view that one program crops
_BLOCK = 1024  # px of a view that one program recolours or blurs

# Columns of the table. FACTORS are adjacent, in the order of the changes' numbers.
_TOP, _LEFT, _HEIGHT, _WIDTH, _FLIP, _ORDER, _GRAY, _BLUR = (
    tl.constexpr(COLUMNS.index(name))
    for name in ("top", "left", "height", "width", "flip", "order", "gray", "blur")
)
_TAPS = tl.constexpr(len(COLUMNS))  # the blur's taps follow in each row
_FACTORS = tl.constexpr(FACTORS[0])
_CONTRAST, _SATURATION, _HUE = (tl.constexpr(n) for n in (CONTRAST, SATURATION, HUE))
_RED, _GREEN, _BLUE = (tl.constexpr(weight) for weight in LUMA)
_CUT, _HUE_STEPS = tl.constexpr(CUT), tl.constexpr(HUE_STEPS)
assert [n - FACTORS[0] for n in FACTORS] == [BRIGHTNESS, CONTRAST, SATURATION, HUE]


def make_cuda_views(batch: ImageBatch, settings: ViewSettings, *, dtype: torch.dtype) -> Views:
    """Make the views of a batch whose pixels are on a CUDA device, without waiting for it.

    Args:
        batch: decoded images with parameters; all but the pixels on the CPU.
        settings: of the views.
        dtype: of the views.

    Returns:
        Normalised views.
    """
    device, rand = batch.pixels.device, 1 + settings.rand_views
    rows = batch.table.flatten(0, 1)
    taps = blur_taps(rows[:, _BLUR.value].numpy(), settings.blur_radius[1])
    table = _upload(torch.cat([rows, torch.from_numpy(taps)], dim=1), device)
    # Where each image begins, in px, and how wide it is.
    images = _upload(torch.stack([batch.starts, batch.sizes[:, 1]], dim=1), device)
    large, count = rand * len(images), len(images)

    def make(rows: Tensor, size: int) -> Tensor:
        views = _make(batch.pixels, images, rows, size, dtype)
        return views.view(len(rows) // count, count, 3, size, size)

    first = make(table[:large], settings.rand_size)
    return Views(first[0], first[1:], make(table[large:], settings.focal_side))


def _upload(values: Tensor, device: torch.device) -> Tensor:
    """Copy from pinned memory; otherwise the host waits for the work queued on the device."""
    pinned = values.pin_memory() if device.type == "cuda" else values
    return pinned.to(device, non_blocking=True)


@cache
def _orders(device: torch.device) -> Tensor:
    return _upload(torch.from_numpy(JITTER_ORDERS.astype(np.int32)), device)


def _make(pixels: Tensor, images: Tensor, table: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """The views [n, 3, size, size] of the table's rows [n, columns + taps]."""
    count = len(table)
    inner = torch.float32 if dtype.itemsize > 2 else torch.float16
    cropped = torch.empty(count, 3, size, size, device=table.device, dtype=inner)
    views = torch.empty_like(cropped, dtype=dtype)
    if count == 0:
        return views
    high, wide = _TILE
    tiles = -(-size // high) * -(-size // wide)
    crop_kernel[count, tiles](
        pixels, images, table, cropped, len(images), table.shape[1], size, high, wide
    )
    blocks = -(-(size**2) // _BLOCK)
    grays = torch.empty(count, blocks, device=table.device)
    common = (table, _orders(table.device), grays, table.shape[1], size)
    most = triton.next_power_of_2(blocks)
    gray_kernel[count, blocks](cropped, *common, _BLOCK)
    colour_kernel[count, blocks](cropped, *common, blocks, most, _BLOCK)
    reach = table.shape[1] - len(COLUMNS) - 1
    blocks = -(-(3 * size**2) // _BLOCK)
    across = torch.empty_like(cropped)
    blur_rows_kernel[count, blocks](cropped, across, table, table.shape[1], size, reach, _BLOCK)
    scale = [1 / (255 * std) for std in IMAGENET_STD]
    shift = [mean / std for mean, std in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)]
    blur_columns_kernel[count, blocks](
        cropped, across, views, table, table.shape[1], size, reach, *scale, *shift, _BLOCK
    )
    return views


@triton.jit
def crop_kernel(
    pixels, images, table, out, num_images, columns, size, HIGH: tl.constexpr, WIDE: tl.constexpr
):
    """A tile of a view: cut out, resized with antialias, flipped; values 0 to 255."""
    view, tile = tl.program_id(0), tl.program_id(1)
    row, image = table + view * columns, images + (view % num_images) * 2
    start, width = tl.load(image), tl.load(image + 1)
    top, left = tl.load(row + _TOP), tl.load(row + _LEFT)
    bottom, right = top + tl.load(row + _HEIGHT), left + tl.load(row + _WIDTH)
    tiles_across = tl.cdiv(size, WIDE)
    y = (tile // tiles_across) * HIGH + tl.arange(0, HIGH)
    x = (tile % tiles_across) * WIDE + tl.arange(0, WIDE)
    # Centres in the image, half the width of the triangles, and the first pixel in reach.
    scale_y, scale_x = (bottom - top) / size, (right - left) / size
    reach_y, reach_x = tl.maximum(scale_y, 1.0), tl.maximum(scale_x, 1.0)
    steps = tl.where(tl.load(row + _FLIP) > 0, size - (x + 0.5), x + 0.5)
    centre_y, centre_x = top + (y + 0.5) * scale_y, left + steps * scale_x
    first_y = tl.maximum(tl.floor(centre_y - reach_y), top)
    first_x = tl.maximum(tl.floor(centre_x - reach_x), left)
    taps_y = (2 * tl.ceil(reach_y)).to(tl.int32) + 1
    taps_x = (2 * tl.ceil(reach_x)).to(tl.int32) + 1
    sum_y, sum_x = tl.zeros([HIGH], tl.float32), tl.zeros([WIDE], tl.float32)
    red = tl.zeros([HIGH, WIDE], tl.float32)
    green, blue = tl.zeros([HIGH, WIDE], tl.float32), tl.zeros([HIGH, WIDE], tl.float32)
    for tap in range(0, taps_x):
        at_x = first_x + tap
        weight = tl.maximum(1 - tl.abs(at_x + 0.5 - centre_x) / reach_x, 0.0)
        sum_x += tl.where(at_x < right, weight, 0.0)
    for tap_y in range(0, taps_y):
        at_y = first_y + tap_y
        weight_y = tl.maximum(1 - tl.abs(at_y + 0.5 - centre_y) / reach_y, 0.0)
        weight_y = tl.where(at_y < bottom, weight_y, 0.0)
        sum_y += weight_y
        line = start + tl.minimum(at_y, bottom - 1).to(tl.int64) * width
        for tap_x in range(0, taps_x):
            at_x = first_x + tap_x
            weight_x = tl.maximum(1 - tl.abs(at_x + 0.5 - centre_x) / reach_x, 0.0)
            weight_x = tl.where(at_x < right, weight_x, 0.0)
            weight = weight_y[:, None] * weight_x[None, :]
            place = line[:, None] + tl.minimum(at_x, right - 1).to(tl.int64)[None, :]
            place = pixels + place * 3
            red += weight * tl.load(place).to(tl.float32)
            green += weight * tl.load(place + 1).to(tl.float32)
            blue += weight * tl.load(place + 2).to(tl.float32)
    scale = 1 / (sum_y[:, None] * sum_x[None, :])
    place = out + view.to(tl.int64) * 3 * size * size + y[:, None] * size + x[None, :]
    inside = (y[:, None] < size) & (x[None, :] < size)
    tl.store(place, red * scale, mask=inside)
    tl.store(place + size * size, green * scale, mask=inside)
    tl.store(place + 2 * size * size, blue * scale, mask=inside)


@triton.jit
def gray_kernel(cropped, table, orders, grays, columns, size, BLOCK: tl.constexpr):
    """Sum of a block's gray values just before contrast, for views whose contrast changes."""
    view, block = tl.program_id(0), tl.program_id(1)
    row = table + view * columns
    if tl.load(row + _FACTORS + _CONTRAST) != 1.0:
        place, inside = _places(view, block, size, BLOCK)
        red, green, blue = _channels(cropped + place, inside, size)
        red, green, blue = _jitter(red, green, blue, row, orders, 0.0, True)
        gray = tl.where(inside, _RED * red + _GREEN * green + _BLUE * blue, 0.0)
        tl.store(grays + view * tl.num_programs(1) + block, tl.sum(gray))


@triton.jit
def colour_kernel(
    cropped, table, orders, grays, columns, size, blocks, MOST: tl.constexpr, BLOCK: tl.constexpr
):
    """Jitter and gray of a block of pixels, in place."""
    view, block = tl.program_id(0), tl.program_id(1)
    row = table + view * columns
    parts = tl.arange(0, MOST)
    # Undefined, and unused, where contrast stays.
    total = tl.sum(tl.load(grays + view * blocks + parts, mask=parts < blocks, other=0.0))
    mean = tl.floor(total / (size * size) + 0.5)
    place, inside = _places(view, block, size, BLOCK)
    red, green, blue = _channels(cropped + place, inside, size)
    red, green, blue = _jitter(red, green, blue, row, orders, mean, False)
    if tl.load(row + _GRAY) > 0:
        red = _RED * red + _GREEN * green + _BLUE * blue
        green = red
        blue = red
    tl.store(cropped + place, red, mask=inside)
    tl.store(cropped + place + size * size, green, mask=inside)
    tl.store(cropped + place + 2 * size * size, blue, mask=inside)


@triton.jit
def _places(view, block, size, BLOCK: tl.constexpr):
    """Offsets of a block of a view's red plane, and which of them are inside the view."""
    at = block * BLOCK + tl.arange(0, BLOCK)
    return view.to(tl.int64) * 3 * size * size + at, at < size * size


@triton.jit
def _channels(place, inside, size):
    red = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    green = tl.load(place + size * size, mask=inside, other=0.0).to(tl.float32)
    blue = tl.load(place + 2 * size * size, mask=inside, other=0.0).to(tl.float32)
    return red, green, blue


@triton.jit
def _jitter(red, green, blue, row, orders, mean, BEFORE_CONTRAST: tl.constexpr):
    """The four changes in the view's order, or those before contrast, whose `mean` is the gray."""
    order = tl.load(row + _ORDER).to(tl.int32)
    goes_on = True
    for position in tl.static_range(4):
        change = tl.load(orders + order * 4 + position)
        factor = tl.load(row + _FACTORS + change)
        happens = factor != tl.where(change == _HUE, 0.0, 1.0)
        if BEFORE_CONTRAST:
            goes_on = goes_on & (change != _CONTRAST)
            happens = happens & goes_on
        if happens:
            if change == _HUE:
                red, green, blue = _turn_hue(red, green, blue, factor)
            else:
                gray = _RED * red + _GREEN * green + _BLUE * blue
                base = tl.where(change == _CONTRAST, mean, 0.0)
                rest = tl.where(change == _SATURATION, gray, base) * (1 - factor) - _CUT
                red = tl.clamp(red * factor + rest, 0.0, 255.0)
                green = tl.clamp(green * factor + rest, 0.0, 255.0)
                blue = tl.clamp(blue * factor + rest, 0.0, 255.0)
    return red, green, blue


@triton.jit
def _turn_hue(red, green, blue, hue):
    """As `msn.data.colour.turn_hue`, with the same letters."""
    high = tl.maximum(tl.maximum(red, green), blue)
    low = tl.minimum(tl.minimum(red, green), blue)
    chroma = high - low
    p, q = high - red, tl.abs(green - blue)
    angle = p + q + 2 * tl.minimum(p, chroma - q)
    steps = tl.floor(tl.abs(hue) * _HUE_STEPS)  # fractions are cut off
    turned = tl.where(hue < 0, -steps, steps) / _HUE_STEPS
    angle = tl.where(green < blue, -angle, angle) + chroma * (6 * turned)
    full = high + chroma
    from_red = 3 * chroma - tl.abs(tl.abs(angle) - 3 * chroma)
    from_green = tl.abs(tl.abs(angle + chroma) - 3 * chroma)
    from_blue = tl.abs(tl.abs(angle - chroma) - 3 * chroma)
    red = tl.minimum(tl.maximum(full - from_red, low), high)
    green = tl.minimum(tl.maximum(full - from_green, low), high)
    blue = tl.minimum(tl.maximum(full - from_blue, low), high)
    return red, green, blue


@triton.jit
def blur_rows_kernel(source, out, table, columns, size, reach, BLOCK: tl.constexpr):
    """Blur along the rows of those views that are blurred."""
    view = tl.program_id(0)
    row = table + view * columns
    if tl.load(row + _BLUR) > 0:
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside, x = at < 3 * size * size, at % size
        at = view.to(tl.int64) * 3 * size * size + at
        total = tl.zeros([BLOCK], tl.float32)
        for step in range(-reach, reach + 1):
            near = tl.minimum(tl.maximum(x + step, 0), size - 1) - x
            tap = tl.load(row + _TAPS + tl.abs(step))
            total += tap * tl.load(source + at + near, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + at, total, mask=inside)


@triton.jit
def blur_columns_kernel(
    plain,
    across,
    out,
    table,
    columns,
    size,
    reach,
    scale_red,
    scale_green,
    scale_blue,
    shift_red,
    shift_green,
    shift_blue,
    BLOCK: tl.constexpr,
):
    """Blur along the columns where views are blurred, and normalise all."""
    view = tl.program_id(0)
    row = table + view * columns
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, y, channel = at < 3 * size * size, (at // size) % size, at // (size * size)
    at = view.to(tl.int64) * 3 * size * size + at
    total = tl.zeros([BLOCK], tl.float32)
    if tl.load(row + _BLUR) > 0:
        for step in range(-reach, reach + 1):
            near = (tl.minimum(tl.maximum(y + step, 0), size - 1) - y) * size
            tap = tl.load(row + _TAPS + tl.abs(step))
            total += tap * tl.load(across + at + near, mask=inside, other=0.0).to(tl.float32)
    else:
        total = tl.load(plain + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.where(channel == 0, scale_red, tl.where(channel == 1, scale_green, scale_blue))
    shift = tl.where(channel == 0, shift_red, tl.where(channel == 1, shift_green, shift_blue))
    tl.store(out + at, total * scale - shift, mask=inside)
