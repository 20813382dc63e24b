"""What is done to an image before a backbone sees it: the same in every format we write."""

import os
from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms.functional import to_pil_image

from msn.data.decode import BadImageError, decode, full_size, read_file, upright_rgb
from msn.data.depth import SIXTEEN_BITS, Levels
from msn.errors import UserError

WHOLE_BELOW = 64  # px
# A centre crop never sees what is farther from the centre than half a short side; of longer images
# the rest is left out before they are resized, with room for the filter.
_LONGEST = 8  # times the short side

Picture = str | os.PathLike[str] | Image.Image | Tensor


def image_transform(
    image_size: int,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    levels: Levels = SIXTEEN_BITS,
) -> Callable[[Picture], Tensor]:
    """Turn upright, resize the short side, centre crop, normalise (paper A.2).

    Args:
        image_size: side of the crop in px; the short side is `short_side(image_size)` before.
        mean: of each channel.
        std: likewise.
        levels: the values that are black and white in images of more than 8 bits.

    Returns:
        From an image to float32 [3, S, S]. An image is a path, a PIL image of any mode, or a tensor
        uint8 [3, H, W], [1, H, W] or [H, W]; EXIF rotation is applied, where there is any left. It
        raises a UserError for what is none of these or cannot be read.
    """
    return transforms.Compose(
        [
            _Opened(levels),
            trimmed,
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


def trimmed(image: Image.Image) -> Image.Image:
    """The middle of a very long image, eight times as long as wide; all others as they are.

    Resized whole, an image of 60,000 x 1 px would take gigabytes, of which a crop keeps a square.
    """
    width, height = image.size
    most = _LONGEST * min(width, height)
    if max(width, height) <= most:
        return image
    left, top = max(0, width - most) // 2, max(0, height - most) // 2
    return image.crop((left, top, left + min(width, most), top + min(height, most)))


class _Opened:
    """From what people have to an upright RGB image; a class, so that it travels to workers."""

    def __init__(self, levels: Levels) -> None:
        self.levels = levels

    def __call__(self, picture: Picture) -> Image.Image:
        if isinstance(picture, Tensor):
            return _from_tensor(picture)
        if isinstance(picture, Image.Image) and 0 in picture.size:
            raise UserError(f"an image must have pixels, got {picture.size[0]} x {picture.size[1]}")
        if not isinstance(picture, Image.Image | str | os.PathLike):
            raise UserError(f"an image must be a path, a PIL image or a tensor, got {picture!r}")
        try:
            if isinstance(picture, Image.Image):
                return upright_rgb(picture, self.levels)
            return Image.fromarray(decode(read_file(picture), full_size, self.levels).pixels)
        except BadImageError as error:
            raise UserError(f"{picture}: cannot be read ({error})") from None


def _from_tensor(picture: Tensor) -> Image.Image:
    channels = 1 if picture.ndim < 3 else picture.shape[0]
    shaped = picture.ndim in (2, 3) and channels in (1, 3) and 0 not in picture.shape
    if picture.dtype != torch.uint8 or not shaped:
        raise UserError(
            "a tensor must be uint8 [3, H, W], [1, H, W] or [H, W], got "
            f"{str(picture.dtype).removeprefix('torch.')} {list(picture.shape)}"
        )
    return to_pil_image(picture.cpu()).convert("RGB")
