"""Raw pixels as features: the floor that any backbone must beat."""

from collections.abc import Callable
from functools import partial

import torch
from PIL import Image
from torch import Tensor, nn

from msn.weights.preprocessing import trimmed

# Largest side in px: more pixels cost much memory and, without a network, tell classes no better.
LARGEST_SIDE = 32


class NoNetwork(nn.Module):
    """A trunk that gives back what it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Identity()

    def forward_intermediates(self, rows: Tensor, last: int) -> list[Tensor]:  # noqa: ARG002
        """Rows [B, D] as the one token of each image, [B, 1, D]."""
        return [rows.unsqueeze(1)]


def pixel_transform(size: int) -> Callable[[Image.Image], Tensor]:
    """From an RGB image to the pixels of its centre crop, in [0, 1], float32 [3 * size * size].

    Args:
        size: side in px to which the shorter side is resized, >= 1.
    """
    return partial(_pixels, size=size)


def _pixels(image: Image.Image, size: int) -> Tensor:
    image = trimmed(image)
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    cropped = resized.crop((left, top, left + size, top + size))
    return torch.frombuffer(bytearray(cropped.tobytes()), dtype=torch.uint8).float() / 255
