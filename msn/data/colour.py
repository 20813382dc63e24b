"""Colour changes and blur as Pillow makes them, for many views at once, on any device.

Pixels are floats from 0 to 255, planes first: [n, 3, H, W]. Brightness, contrast and saturation
blend a view with a base: black, its mean gray, its gray image. Hue turns the colour circle. Pillow
truncates to whole gray levels; here fractions are kept, and the half level that truncation costs on
average is subtracted. Everything is in place: on a CPU fresh memory costs more than the arithmetic.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

# ITU-R 601 luma with the 16-bit weights that Pillow uses.
LUMA = (19595 / 65536, 38470 / 65536, 7471 / 65536)
HUE_STEPS = 255  # Pillow turns the hue by whole 1/255 of the circle, truncated
_BOXES = 3  # of Pillow's Gaussian blur
CUT = 0.5  # gray levels that truncation loses on average


def gray_image(pixels: Tensor) -> Tensor:
    """Gray values of colour images, [n, 3, H, W] to [n, 1, H, W]."""
    red, green, blue = pixels.split(1, 1)
    return torch.mul(red, LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def mean_gray(pixels: Tensor) -> Tensor:
    """Mean gray of views, rounded as Pillow does, [n, 3, H, W] to [n, 1, 1, 1]."""
    means = pixels.flatten(-2).mean(-1, dtype=torch.float32)
    gray = (means @ _luma(pixels.device)).add_(0.5).floor_()
    return gray.to(pixels.dtype)[..., None, None, None]


@cache
def _luma(device: torch.device) -> Tensor:
    return torch.tensor(LUMA, device=device)


def blend(pixels: Tensor, base: Tensor | None, factor: Tensor) -> Tensor:
    """Move pixels away from a base, in place: factor 0 gives the base, 1 the pixels, 2 beyond.

    Args:
        pixels: [n, 3, H, W].
        base: broadcasts against `pixels` and is overwritten; None is black.
        factor: [n, 1, 1, 1].
    """
    rest = -CUT if base is None else base.mul_(1 - factor).sub_(CUT)
    return pixels.mul_(factor).add_(rest).clamp_(0, 255)


def turn_hue(pixels: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue in place; value and saturation stay.

    Written without masks and divisions: with the angle h in sixths of the circle from red, in
    [-3, 3], and chroma c = high - low, a channel is full within 1 of its own colour, empty from 2
    on and linear between: clamp(high + c - c * distance, low, high).

    Args:
        pixels: [n, 3, H, W].
        turns: in [-0.5, 0.5], [n, 1, 1, 1].
    """
    red, green, blue = pixels.split(1, 1)
    high, low, chroma, angle, other = pixels.new_empty(5, *red.shape).unbind()
    torch.maximum(torch.maximum(red, green, out=high), blue, out=high)
    torch.minimum(torch.minimum(red, green, out=low), blue, out=low)
    torch.sub(high, low, out=chroma)

    # c * h = p + q + 2 * min(p, c - q) with p = high - red and q = |green - blue|, where red is the
    # greatest (p = 0), the middle (q = c) and the least (p = c) alike; green - blue has its sign.
    torch.sub(green, blue, out=green)
    torch.abs(green, out=other)  # q
    torch.sub(high, red, out=angle)  # p
    torch.sub(chroma, other, out=blue)  # c - q
    other.add_(angle).add_(torch.minimum(angle, blue, out=blue), alpha=2).copysign_(green)
    torch.addcmul(other, chroma, (6 * turns).to(chroma.dtype), out=angle)  # in [-6c, 6c]

    # Distances from red, green and blue are 3 - ||h| - 3|, ||h + 1| - 3| and ||h - 1| - 3|.
    red.copy_(angle)
    torch.add(angle, chroma, out=green)
    torch.sub(angle, chroma, out=blue)
    torch.add(high, chroma, out=other)
    pixels.abs_().sub_(chroma.mul_(3)).abs_()
    torch.sub(chroma, red, out=red)
    return torch.clamp(torch.sub(other, pixels, out=pixels), low, high, out=pixels)


def box_radius(radius: np.ndarray) -> np.ndarray:
    """Radius in px of the box that, applied three times, blurs like a Gaussian of `radius` px.

    Pillow's Gaussian blur is three box blurs: the extended box filter of Gwosdek et al. (SSVM
    2011), whose box has a whole part and edge pixels that count partly.
    """
    variance = np.asarray(radius, np.float64) ** 2 / _BOXES
    whole = np.floor((np.sqrt(12 * variance + 1) - 1) / 2)
    edge = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    return whole + edge / (6 * (variance - (whole + 1) ** 2))


def blur_taps(radius: np.ndarray, greatest: float) -> np.ndarray:
    """One half of the kernel of three box blurs, from its centre outwards.

    Args:
        radius: of the Gaussian in px, [n]; 0 gives the identity.
        greatest: upper bound of the radii; it sets the number of taps.

    Returns:
        Weights at distance 0, 1, ..., reach, float32 [n, reach + 1].
    """
    box = box_radius(np.asarray(radius))[:, None]
    half = int(np.ceil(box_radius(np.array(greatest))))
    distance = np.abs(np.arange(-half, half + 1))
    once = np.clip(box - distance + 1, 0, 1) / (2 * box + 1)  # [n, 2 * half + 1]
    size = once.shape[1] * _BOXES  # no wrap-around in the product of the transforms
    spectrum = np.fft.rfft(once, size) ** _BOXES
    kernel = np.fft.irfft(spectrum, size)[:, _BOXES * half : 2 * _BOXES * half + 1]
    return kernel.astype(np.float32)


def blur_matrices(taps: Tensor, size: int) -> Tensor:
    """Matrices that blur views of one size; edge pixels are repeated beyond the image.

    Args:
        taps: of `blur_taps`, on any device, [n, reach + 1].
        size: side of the views in px.

    Returns:
        Rows that sum to 1, [n, size, size]; `matrix @ x` blurs columns.
    """
    reach = min(taps.shape[1], size) - 1
    near = taps[:, : reach + 1]
    line = taps.new_zeros(len(taps), 2 * size - 1)  # row 0 of the matrix is its second half
    line[:, size - 1 : size + reach] = near
    line[:, size - 1 - reach : size] = near.flip(1)
    matrix = line.unfold(1, size, 1).flip(1)
    # What a row would take from beyond the edge.
    beyond = taps.flip(1).cumsum(1).flip(1)[:, 1 : 1 + size]
    matrix[:, : beyond.shape[1], 0] += beyond
    matrix[:, size - beyond.shape[1] :, -1] += beyond.flip(1)
    return matrix
