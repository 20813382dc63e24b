"""Pillow's Gaussian blur, which is three box blurs, as one banded matrix for rows and columns."""

from __future__ import annotations

import numpy as np
import torch
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
        Weights at distance 0, 1, ..., reach, and one 0 for everything farther, float32
        [n, reach + 2].
    """
    box = box_radius(np.asarray(radius))[:, None]
    half = int(np.ceil(box_radius(np.array(greatest))))
    distance = np.abs(np.arange(-half, half + 1))
    once = np.clip(box - distance + 1, 0, 1) / (2 * box + 1)  # [n, 2 * half + 1]
    size = once.shape[1] * PASSES  # no wrap-around in the product of the transforms
    spectrum = np.fft.rfft(once, size) ** PASSES
    kernel = np.fft.irfft(spectrum, size)[:, PASSES * half : 2 * PASSES * half + 1]
    return np.pad(kernel, ((0, 0), (0, 1))).astype(np.float32)


class BlurMatrix:
    """Makes blur matrices for views of one size.

    Args:
        size: side of the views in px.
        greatest: greatest radius in px.
        device: where the matrices are made.
    """

    def __init__(self, size: int, greatest: float, device: torch.device) -> None:
        self.size, self.greatest = size, greatest
        reach = blur_taps(np.zeros(1), greatest).shape[1] - 2
        at = torch.arange(size, device=device)
        distance = (at[:, None] - at).abs()
        self.distance = distance.clamp(max=reach + 1).flatten()  # [size * size], the last is 0
        self.first, self.last = min(reach, size), max(0, size - reach)

    def __call__(self, taps: Tensor) -> Tensor:
        """Matrices from kernels: the image's edge pixels repeat beyond it.

        Args:
            taps: of `blur_taps`, on the same device, [n, reach + 2].

        Returns:
            Rows that sum to 1, [n, size, size]; `matrix @ x` blurs columns.
        """
        matrix = taps.index_select(1, self.distance).view(-1, self.size, self.size)
        missing = 1 - matrix.sum(-1)
        matrix[:, : self.first, 0] += missing[:, : self.first]
        matrix[:, self.last :, -1] += missing[:, self.last :]
        return matrix
