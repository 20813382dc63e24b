"""The evaluation transform: one centre crop of an image, normalised."""

from __future__ import annotations

from collections.abc import Callable

from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from msn.data.views import IMAGENET_MEAN, IMAGENET_STD


def evaluation_transform(image_size: int) -> Callable[[Image.Image], Tensor]:
    """Make the low-shot protocol's transform: shorter side to 256/224 of the size, centre crop.

    An image that has the size already (small data sets such as digits or CIFAR) is taken whole.

    Args:
        image_size: side of the crop in px; 224 gives the paper's Resize(256) and CenterCrop(224).

    Returns:
        A picklable function from an RGB image to a normalised float32 tensor [3, size, size].
    """
    return _CentreCrop(image_size)


class _CentreCrop:
    def __init__(self, image_size: int) -> None:
        self.size = (image_size, image_size)
        self.crop = v2.Compose(
            [v2.Resize(round(image_size * 256 / 224)), v2.CenterCrop(image_size)]
        )

    def __call__(self, image: Image.Image) -> Tensor:
        image = image if image.size == self.size else self.crop(image)
        pixels = v2.functional.pil_to_tensor(image).float().div_(255)
        return v2.functional.normalize(
            pixels, list(IMAGENET_MEAN), list(IMAGENET_STD), inplace=True
        )
