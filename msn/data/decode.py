"""From the bytes of any image file to RGB pixels, once, no larger than the views need."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from io import BytesIO
from typing import NamedTuple

import numpy as np
import torch
import torchvision.io  # registers the JPEG decoder among torch's operators
from PIL import ExifTags, Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".pjpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
# Images too, of kinds that are passed over: that shall not go unseen.
UNREAD_SUFFIXES = (".gif", ".heic", ".heif", ".avif", ".jxl", ".jp2", ".dng", ".psd")

# Pillow warns above 89 megapixels and refuses above 179; only what it refuses is a bomb here.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

_STRIP_PIXELS = 1 << 22  # converted at a time, so that a large image is never held twice
_ORIENTATIONS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a.transpose(1, 0, 2)[:, ::-1],
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: a.transpose(1, 0, 2)[::-1],
}


class BadImageError(Exception):
    """An image that cannot be read; the message is the reason, without the path."""


class DecodedImage(NamedTuple):
    """Upright RGB pixels and what was done to get them.

    Attributes:
        pixels: uint8 [h, w, 3]; h and w are the full sizes divided by `reduction`, rounded up.
        height: full height of the upright image in px.
        width: full width of the upright image in px.
        reduction: whole number >= 1 by which both sides were divided.
    """

    pixels: np.ndarray
    height: int
    width: int
    reduction: int


def full_size(height: int, width: int) -> int:
    """Allow no reduction: the `allowed_reduction` of whoever wants every pixel."""
    return 1


def decode(data: bytes, allowed_reduction: Callable[[int, int], int]) -> DecodedImage:
    """Decode an image file into upright RGB, scaled down while decoding where that is allowed.

    Gray, palette, CMYK, 16-bit and alpha images become 8-bit RGB (alpha is dropped, as Pillow's
    `convert("RGB")` does); EXIF rotation is applied.

    Args:
        data: the bytes of the file.
        allowed_reduction: from upright height and width in px to the greatest whole number by which
            both may be divided.

    Returns:
        The pixels with their full size.

    Raises:
        BadImageError: the bytes are empty, truncated, not an image, or a decompression bomb.
    """
    if not data:
        raise BadImageError("empty file")
    plain = _plain_jpeg_size(data)
    if plain is not None and allowed_reduction(*plain) <= 1:
        pixels = _by_torchvision("decode_jpeg", data)
        if pixels is not None:
            return DecodedImage(pixels, *plain, 1)
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)
        orientation = _orientation(image)
        width, height = image.size
        if orientation >= 5:
            width, height = height, width
        reduction = _attainable(image, max(1, allowed_reduction(height, width)))
        pixels = _load(image, data, reduction)
    except Image.UnidentifiedImageError:
        raise BadImageError(f"not an image of a kind we read ({', '.join(FORMATS)})") from None
    except Exception as error:  # noqa: BLE001 - decoders raise anything on damaged files
        raise BadImageError(f"{type(error).__name__}: {error}") from error
    del image  # Pillow holds four bytes a pixel, which turning need not come on top of
    if orientation > 1:
        pixels = np.ascontiguousarray(_ORIENTATIONS[orientation](pixels))
    return DecodedImage(pixels, height, width, reduction)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation that is still to be applied, 1 to 8."""
    if image.format == "TIFF" or (image.format == "JPEG" and "exif" not in image.info):
        return 1  # Pillow turns TIFF while loading; asking a JPEG without EXIF costs time
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    return orientation if orientation in _ORIENTATIONS else 1


def _draft_scale(reduction: int) -> int:
    """By how much the JPEG decoder itself scales down: 1, 2, 4 or 8."""
    return next(scale for scale in (8, 4, 2, 1) if scale <= reduction)


def _attainable(image: Image.Image, allowed: int) -> int:
    """The reduction to use: for a JPEG a multiple of what its decoder does for nothing."""
    if image.format != "JPEG":
        return allowed
    return allowed // _draft_scale(allowed) * _draft_scale(allowed)


def _plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Height and width of a JPEG that only needs decoding: gray or three channels, upright.

    None for everything else, which Pillow looks at: reading a header takes it a tenth of a
    millisecond, as long as four percent of decoding a photograph.
    """
    if not data.startswith(b"\xff\xd8\xff"):
        return None
    at = 2
    while at + 10 < len(data) and data[at] == 0xFF and 0xC0 <= data[at + 1] <= 0xFE:
        marker, begin = data[at + 1], data[at + 4 : at + 8]
        if marker in (0xC0, 0xC1, 0xC2):  # a frame of the kinds that everybody reads
            height = int.from_bytes(data[at + 5 : at + 7], "big")
            width = int.from_bytes(data[at + 7 : at + 9], "big")
            plain = data[at + 4] == 8 and data[at + 9] in (1, 3) and height * width > 0
            limit = 2 * (Image.MAX_IMAGE_PIXELS or math.inf)  # beyond it Pillow speaks of a bomb
            return (height, width) if plain and height * width <= limit else None
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if begin == b"MPF\0" or 0xD0 <= marker <= 0xDA:
            return None
        if begin == b"Exif" and not _says_upright(data[at + 4 : end]):
            return None
        at = end
    return None


def _says_upright(block: bytes) -> bool:
    """Whether an EXIF block says that nothing is to be turned; where it is silent, others may."""
    exif = Image.Exif()
    try:
        exif.load(block)
        return exif.get(ExifTags.Base.Orientation) == 1
    except Exception:  # noqa: BLE001 - it raises anything on damaged blocks
        return False


def _by_torchvision(operator: str, data: bytes) -> np.ndarray | None:
    """Decode a whole file to uint8 [H, W, 3]; None leaves it to Pillow to say what is wrong.

    The pixels are Pillow's, bit by bit, JPEGs a fifth faster: no fourth channel, no copy into an
    array. The operator is called and not torchvision's function around it, which is deprecated and
    warns so at every call, 3 % of the time; where a torchvision has neither, Pillow decodes.
    """
    try:
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        run = getattr(torch.ops.image, operator)
        decoded = run(encoded, torchvision.io.ImageReadMode.RGB.value)
    except (AttributeError, RuntimeError):
        return None
    pixels: np.ndarray = decoded.permute(1, 2, 0).numpy()
    return pixels


def _load(image: Image.Image, data: bytes, reduction: int) -> np.ndarray:
    """Decode to uint8 [ceil(H / reduction), ceil(W / reduction), 3]."""
    remaining = reduction
    if image.format == "WEBP":  # Pillow decodes it as an animation, at 19 bytes a pixel
        pixels = _by_torchvision("decode_webp", data)
        if pixels is not None:
            image = Image.fromarray(pixels)
            del pixels
    if image.format == "JPEG" and reduction > 1:
        width, height = image.size
        scale = _draft_scale(reduction)
        image.draft(None, (width // scale, height // scale))
        remaining = reduction // scale
    image.load()
    width, height = image.size
    if width * height <= _STRIP_PIXELS:
        return np.asarray(_to_rgb(image, remaining))
    rows = max(1, _STRIP_PIXELS // (width * remaining)) * remaining
    pixels = np.empty((-(-height // remaining), -(-width // remaining), 3), np.uint8)
    for top in range(0, height, rows):
        strip = image.crop((0, top, width, min(top + rows, height)))
        converted = np.asarray(_to_rgb(strip, remaining))
        pixels[top // remaining :][: len(converted)] = converted
    return pixels


def _to_rgb(image: Image.Image, reduction: int) -> Image.Image:
    if image.mode in ("I;16", "I;16L", "I;16B", "I"):
        # Pillow's own conversion clips 16-bit values at 255 instead of scaling them.
        gray = np.clip(np.asarray(image).astype(np.int32) >> 8, 0, 255).astype(np.uint8)
        image = Image.fromarray(gray)
    elif image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range; store 8 or 16 bits")
    if image.mode != "RGB":
        image = image.convert("RGB")
    return image if reduction == 1 else image.reduce(reduction)
