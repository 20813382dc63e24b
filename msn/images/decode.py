"""Decoding of image files of any kind to RGB pixels, no larger than the views need."""

from __future__ import annotations

import logging
import math
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
import torchvision.io  # registers the JPEG decoder among torch's operators
from PIL import ExifTags, Image
from torch.utils.data import get_worker_info

from msn.images.depth import (
    SIXTEEN_BITS,
    BeyondWhite,
    Deep,
    Levels,
    find_deep,
    is_gray,
    to_eight_bits,
)
from msn.images.kinds import BadImageError, open_image

log = logging.getLogger(__name__)
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


class DecodedImage(NamedTuple):
    """Upright RGB pixels."""

    pixels: np.ndarray  # uint8 [h, w, 3]; full sizes divided by `reduction`, rounded up
    height: int  # full height of the upright image in px
    width: int  # full width of the upright image in px
    reduction: int  # whole number >= 1 by which both sides were divided


def full_size(height: int, width: int) -> int:
    """An `allowed_reduction` that keeps every pixel."""
    return 1


def decode(
    data: bytes,
    allowed_reduction: Callable[[int, int], int],
    levels: Levels = SIXTEEN_BITS,
) -> DecodedImage:
    """Decode an image file into upright RGB, scaled down while decoding where that is allowed.

    Gray, palette, CMYK, 16-bit and alpha images become 8-bit RGB (alpha is dropped, as Pillow's
    `convert("RGB")` does); EXIF rotation is applied; of an animation the first picture is taken.
    Peak memory is at most three times the full image as 8-bit RGB, five times for 16-bit colours.

    Args:
        data: the bytes of the file.
        allowed_reduction: maps upright height and width in px to the greatest whole number by which
            both may be divided.
        levels: the values that become black and white in images of more than 8 bits.

    Raises:
        BadImageError: the bytes are empty, truncated, not an image, a decompression bomb, or more
            than fits into memory.
    """
    if not data:
        raise BadImageError("empty file")
    with _saying_why():
        plain = _plain_jpeg_size(data)
        if plain is not None and allowed_reduction(*plain) <= 1:
            pixels = _by_torchvision("decode_jpeg", data)
            if pixels is not None:
                return DecodedImage(pixels, *plain, 1)
        with _counted_warnings():
            return _by_pillow(data, allowed_reduction, levels)


def upright_rgb(image: Image.Image, levels: Levels = SIXTEEN_BITS) -> Image.Image:
    """An opened image of any mode as upright RGB of 8 bits; it is not changed.

    Raises:
        BadImageError: it cannot be read, or has floating-point pixels.
    """
    with _saying_why(), _counted_warnings():
        image.load()  # a TIFF turns while it loads
        orientation = _orientation(image) if image.info else 1
        if orientation == 1 and image.mode == "RGB":
            return image
        pixels = _in_strips(image, Deep() if is_gray(image) else None, 1, levels)
        return Image.fromarray(np.ascontiguousarray(_turned(pixels, orientation)))


def extremes(data: bytes) -> tuple[int, int] | None:
    """Least and greatest value of an image of more than 8 bits; None for all others.

    Raises:
        BadImageError: it cannot be read.
    """
    with _saying_why(), _counted_warnings():
        image = open_image(data)
        deep = find_deep(image, lambda: open_image(data))
        if deep is None:
            return None
        image.load()
        parts = [deep.part(box).values(image.crop(box)) for box in _strips(image.size, 1)]
        return min(int(part.min()) for part in parts), max(int(part.max()) for part in parts)


@contextmanager
def _saying_why() -> Iterator[None]:
    """Whatever goes wrong with an image becomes a BadImageError with the reason."""
    try:
        yield
    except BadImageError:
        raise
    except MemoryError:
        raise BadImageError("does not fit into memory") from None
    except Exception as error:  # decoders raise anything on damaged files
        raise BadImageError(f"{type(error).__name__}: {error}") from error


_SAID_OF_IMAGES = {  # whether values are beyond white
    False: "Pillow warned of %d images and read them; now: %s",
    True: "%d images have values that data.depth makes white with all above it; now: %s",
}
_warned: Counter[bool] = Counter()
_one_at_a_time = threading.Lock()  # Python's record of warnings is one for all threads


@contextmanager
def _counted_warnings() -> Iterator[None]:
    """Count images that are read with a warning; log the count at powers of ten."""
    with _kept_warnings() as said:
        yield
    worker = get_worker_info()
    for kind, text in _SAID_OF_IMAGES.items():
        now = [w.message for w in said if issubclass(w.category, BeyondWhite) == kind]
        _warned[kind] += bool(now)
        if now and math.log10(_warned[kind]).is_integer() and (worker is None or worker.id == 0):
            log.info(text, _warned[kind], now[0])


@contextmanager
def _kept_warnings() -> Iterator[list[warnings.WarningMessage]]:
    with _one_at_a_time, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield said


def _by_pillow(
    data: bytes, allowed_reduction: Callable[[int, int], int], levels: Levels
) -> DecodedImage:
    image = open_image(data)
    # First: asking a PNG for its orientation loads it.
    deep = find_deep(image, None if levels == SIXTEEN_BITS else lambda: open_image(data))
    orientation = _orientation(image)
    width, height = image.size
    if orientation >= 5:
        width, height = height, width
    reduction = _attainable(image, max(1, allowed_reduction(height, width)))
    pixels = _load(image, data, deep, reduction, levels)
    del image, deep  # frees Pillow's four bytes per pixel before turning
    return DecodedImage(_turned(pixels, orientation), height, width, reduction)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation that is still to be applied, 1 to 8; 1 if the block is damaged."""
    if image.format == "TIFF" or (image.format == "JPEG" and "exif" not in image.info):
        return 1  # Pillow turns TIFF while loading; asking a JPEG without EXIF costs time
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # it raises anything on damaged blocks
        return 1
    return orientation if orientation in _ORIENTATIONS else 1


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    if orientation == 1:
        return pixels
    return np.ascontiguousarray(_ORIENTATIONS[orientation](pixels))


def _draft_scale(reduction: int) -> int:
    """The reduction by the JPEG decoder itself: 1, 2, 4 or 8."""
    return next(scale for scale in (8, 4, 2, 1) if scale <= reduction)


def _attainable(image: Image.Image, allowed: int) -> int:
    """The reduction to use: for a JPEG a multiple of that of its decoder."""
    if image.format != "JPEG":
        return allowed
    return allowed // _draft_scale(allowed) * _draft_scale(allowed)


def _plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Height and width of a JPEG that only needs decoding: gray or three channels, upright.

    None for everything else. Pillow takes 0.1 ms for a header, 4 % of decoding a photograph.
    """
    if not data.startswith(b"\xff\xd8\xff"):
        return None
    at = 2
    while at + 10 < len(data) and data[at] == 0xFF and 0xC0 <= data[at + 1] <= 0xFE:
        marker, begin = data[at + 1], data[at + 4 : at + 8]
        if marker in (0xC0, 0xC1, 0xC2):  # baseline, extended and progressive frames
            height = int.from_bytes(data[at + 5 : at + 7], "big")
            width = int.from_bytes(data[at + 7 : at + 9], "big")
            plain = data[at + 4] == 8 and data[at + 9] in (1, 3) and height * width > 0
            limit = 2 * (Image.MAX_IMAGE_PIXELS or math.inf)  # above it Pillow refuses
            return (height, width) if plain and height * width <= limit else None
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if begin == b"MPF\0" or 0xD0 <= marker <= 0xDA:
            return None
        if begin == b"Exif" and not _says_upright(data[at + 4 : end]):
            return None
        at = end
    return None


def _says_upright(block: bytes) -> bool:
    """Whether an EXIF block has the orientation 1."""
    exif = Image.Exif()
    try:
        with _kept_warnings():  # Pillow looks again, and then they count
            exif.load(block)
        return exif.get(ExifTags.Base.Orientation) == 1
    except Exception:  # it raises anything on damaged blocks
        return False


def _by_torchvision(operator: str, data: bytes) -> np.ndarray | None:
    """Decode a whole file to uint8 [H, W, 3], bit-equal to Pillow, JPEGs a fifth faster.

    None if it fails or torchvision lacks the operator: then Pillow decodes or says what is wrong.
    torchvision's function around the operator is deprecated and warns at every call.
    """
    try:
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        run = getattr(torch.ops.image, operator)
        decoded = run(encoded, torchvision.io.ImageReadMode.RGB.value)
    except (AttributeError, RuntimeError):
        return None
    pixels: np.ndarray = decoded.permute(1, 2, 0).numpy()
    return pixels


def _load(
    image: Image.Image, data: bytes, deep: Deep | None, reduction: int, levels: Levels
) -> np.ndarray:
    """Decode to uint8 [ceil(H / reduction), ceil(W / reduction), 3]."""
    remaining = reduction
    if image.format == "WEBP":  # Pillow decodes it as an animation, at 19 bytes per pixel
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
    return _in_strips(image, deep, remaining, levels)


def _in_strips(image: Image.Image, deep: Deep | None, reduction: int, levels: Levels) -> np.ndarray:
    """Convert a loaded image to RGB and reduce it, uint8 [h, w, 3]."""
    width, height = image.size
    if width * height <= _STRIP_PIXELS:
        return np.asarray(_to_rgb(image, deep, reduction, levels))
    pixels = np.empty((-(-height // reduction), -(-width // reduction), 3), np.uint8)
    for box in _strips(image.size, reduction):
        part = None if deep is None else deep.part(box)
        converted = np.asarray(_to_rgb(image.crop(box), part, reduction, levels))
        pixels[box[1] // reduction :][: len(converted)] = converted
    return pixels


def _strips(size: tuple[int, int], reduction: int) -> Iterator[tuple[int, int, int, int]]:
    """Boxes as wide as the image, some rows each, a multiple of the reduction."""
    width, height = size
    rows = max(1, _STRIP_PIXELS // (width * reduction)) * reduction
    for top in range(0, height, rows):
        yield 0, top, width, min(top + rows, height)


def _to_rgb(image: Image.Image, deep: Deep | None, reduction: int, levels: Levels) -> Image.Image:
    if deep is not None:
        # Pillow's own conversion clips 16-bit values at 255 instead of scaling them.
        image = Image.fromarray(to_eight_bits(deep.values(image), levels))
    elif image.mode == "F":
        raise BadImageError("floating-point pixels have no agreed range; store 8 or 16 bits")
    if image.mode != "RGB":
        image = image.convert("RGB")
    return image if reduction == 1 else image.reduce(reduction)
