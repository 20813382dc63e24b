"""Pillow's Gaussian blur, which is three box blurs, as one banded matrix for rows and columns."""

from __future__ import annotations

import numpy as np
from torch import Tensor

PASSES = 3


def box_radius(radius: np.ndarray) -> np.ndarray:
    """Radius in px of the box that, applied three times, blurs like a Gaussian of `radius` px.

    The extended box filter of Gwosdek et al. (SSVM 2011), which Pillow uses: the box has a whole
    part and edge pixels that count partly.
    """
    variance = np.asarray(radius, np.float64) ** 2 / PASSES
    whole = np.floor((np.sqrt(12 * variance + 1) - 1) / 2)
    edge = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    return whole + edge / (6 * (variance - (whole + 1) ** 2))


def blur_taps(radius: np.ndarray, greatest: float) -> np.ndarray:
    """One half of the kernel that three boxes make, from its centre outwards.

    Args:
        radius: of the Gaussian in px, [n]; 0 gives a kernel that changes nothing.
        greatest: no radius is greater; it sets the number of taps.

    Returns:
        Weights at distance 0, 1, ..., reach, float32 [n, reach + 1].
    """
    box = box_radius(np.asarray(radius))[:, None]
    half = int(np.ceil(box_radius(np.array(greatest))))
    distance = np.abs(np.arange(-half, half + 1))
    once = np.clip(box - distance + 1, 0, 1) / (2 * box + 1)  # [n, 2 * half + 1]
    size = once.shape[1] * PASSES  # no wrap-around in the product of the transforms
    spectrum = np.fft.rfft(once, size) ** PASSES
    kernel = np.fft.irfft(spectrum, size)[:, PASSES * half : 2 * PASSES * half + 1]
    return kernel.astype(np.float32)


def blur_matrices(taps: Tensor, size: int) -> Tensor:
    """Matrices that blur views of one size; the image's edge pixels repeat beyond it.

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
