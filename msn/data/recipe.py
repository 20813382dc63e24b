"""The same views as torchvision's own transforms make them: what the field does, for comparison."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from io import BytesIO

from PIL import Image, ImageFilter
from torch import Tensor
from torchvision import transforms

from msn.data.views import IMAGENET_MEAN, IMAGENET_STD, ViewSettings


def pil_recipe(settings: ViewSettings) -> Callable[[bytes], list[Tensor]]:
    """Make the transform that most public code would use: decode, then view by view through Pillow.

    Its random numbers are torchvision's own, so only its cost and its statistics can be compared.

    Args:
        settings: of the views.

    Returns:
        From an image file's bytes to the normalised views, target first.
    """
    large = _one_view(settings, settings.rand_size, settings.rand_scale)
    small = _one_view(settings, settings.focal_side, settings.focal_scale)

    def make(data: bytes) -> list[Tensor]:
        image = Image.open(BytesIO(data)).convert("RGB")
        views = [large(image) for _ in range(1 + settings.rand_views)]
        return views + [small(image) for _ in range(settings.focal_views)]

    return make


def _one_view(
    settings: ViewSettings, size: int, scale: Sequence[float]
) -> Callable[[Image.Image], Tensor]:
    jitter = transforms.ColorJitter(
        settings.brightness, settings.contrast, settings.saturation, settings.hue
    )

    def blur(image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(*settings.blur_radius)))

    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale=scale, ratio=settings.ratio),
            transforms.RandomHorizontalFlip(settings.flip_probability),
            transforms.RandomApply([jitter], settings.jitter_probability),
            transforms.RandomGrayscale(settings.gray_probability),
            transforms.RandomApply([transforms.Lambda(blur)], settings.blur_probability),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
