"""What is done to an image before a backbone sees it: the same in every format we write."""

from collections.abc import Callable

from PIL import Image
from torch import Tensor
from torchvision import transforms

WHOLE_BELOW = 64  # px


def image_transform(
    image_size: int, *, mean: tuple[float, ...], std: tuple[float, ...]
) -> Callable[[Image.Image], Tensor]:
    """Resize the short side, centre crop, normalise (paper A.2).

    Args:
        image_size: side of the crop in px; the short side is `short_side(image_size)` before.
        mean: of each channel.
        std: likewise.
    """
    return transforms.Compose(
        [
            _to_rgb,
            transforms.Resize(short_side(image_size)),
            transforms.CenterCrop(image_size),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )


def short_side(image_size: int) -> int:
    """Length in px of the short side from which the centre crop is taken: 256 for 224.

    Below 64 px images are taken whole, as is usual with digits and CIFAR: to enlarge what has
    that size already and cut its border off would only lose a part of it.
    """
    return image_size if image_size < WHOLE_BELOW else round(image_size * 256 / 224)


def _to_rgb(image: Image.Image) -> Image.Image:
    return image.convert("RGB")
