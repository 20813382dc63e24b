"""Images of more than 8 bits per channel: the values of a data set that are black and white.

Files of 16 and 32 bits often hold fewer: 12 from microscopes and cameras, CT values from -1,024 on.
So one range is fixed for a whole data set, stored with the run and its weights, and used wherever
images are read for that network.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageFile

from msn.errors import UserError

AUTO = "auto"
Depth = int | list[int]  # bits from 0 on, or the values that are black and white
Levels = tuple[int, int]  # the values that are black and white
SIXTEEN_BITS: Levels = (0, 65_535)
_BITS = (8, 32)
# Pillow keeps the upper bytes of 16-bit colours. Raw modes that make it give the lower ones, and
# the channels in which they then are.
_COLOURS = ("RGB", "RGBX", "RGBA")
_LOWER = {
    **{f"{mode};16B": (f"{mode};16L", (0, 1, 2)) for mode in _COLOURS},
    **{f"{mode};16L": (f"{mode};16B", (0, 1, 2)) for mode in _COLOURS},
    # In the machine's order: the other one.
    **{f"{m};16N": (f"{m};16{'BL'[sys.byteorder == 'big']}", (0, 1, 2)) for m in _COLOURS},
    "LA;16B": ("RGBA", (1, 1, 1)),
}
_UNSIGNED = ("I;32N", "I;32B")  # Pillow's whole numbers are signed
RECORDED = "data_depth"  # key in the header of weights


class BeyondWhite(UserWarning):
    """An image has values above white."""


def check_depth(depth: Any) -> str | Depth:
    """The setting `data.depth`, checked.

    Raises:
        UserError: it is neither `auto`, nor 8 to 32 bits, nor two ascending whole numbers.
    """
    if depth == AUTO:
        return AUTO
    if _is_whole(depth) and _BITS[0] <= depth <= _BITS[1]:
        return int(depth)
    if isinstance(depth, Sequence) and len(depth) == 2 and all(map(_is_whole, depth)):
        low, high = depth
        if -(2**31) <= low < high < 2**32:
            return [low, high]
    raise UserError(
        f"data.depth={depth}: must be auto, a number of bits from {_BITS[0]} to {_BITS[1]}, or the "
        "values that are black and white, as in [-1024,3071]"
    )


def levels_of(depth: Depth | None) -> Levels:
    """The values that are black and white; None is 16 bits."""
    if depth is None:
        return SIXTEEN_BITS
    return (0, 2**depth - 1) if isinstance(depth, int) else (depth[0], depth[1])


class Deep(NamedTuple):
    """What is needed beside a decoded image for its values of more than 8 bits."""

    lower: Image.Image | None = None  # the lower bytes of 16-bit colours
    channels: tuple[int, ...] = ()  # where in `lower` they are
    unsigned: bool = False  # whether negative numbers are large ones

    def part(self, box: tuple[int, int, int, int]) -> Deep:
        """The same for a part of the image: left, top, right, bottom in px."""
        return self if self.lower is None else self._replace(lower=self.lower.crop(box))

    def values(self, image: Image.Image) -> np.ndarray:
        """The values of the decoded image, [h, w] or uint16 [h, w, 3]."""
        pixels = np.asarray(image)
        if self.lower is None:
            return pixels.view(np.uint32) if self.unsigned else pixels
        upper = pixels[..., :3].astype(np.uint16) << 8
        return upper | np.asarray(self.lower)[..., self.channels]


def is_gray(image: Image.Image) -> bool:
    """Whether Pillow keeps the image as whole numbers of more than 8 bits."""
    return image.mode == "I" or image.mode.startswith("I;16")


def find_deep(image: Image.Image, again: Callable[[], Image.Image] | None) -> Deep | None:
    """What reads more than 8 bits of an opened, not yet decoded image; None if it has 8.

    Args:
        image: as it was opened.
        again: opens it once more, for the lower bytes of 16-bit colours; None skips these.
    """
    raw_mode = _raw_mode(image)
    if is_gray(image):
        return Deep(unsigned=raw_mode in _UNSIGNED)
    if raw_mode not in _LOWER or again is None:
        return None
    wanted, channels = _LOWER[raw_mode]
    lower = again()
    assert isinstance(lower, ImageFile.ImageFile)
    lower.tile = [ImageFile._Tile(*tile[:3], _with(wanted, tile[3])) for tile in lower.tile]
    lower.load()
    return Deep(lower, channels)


def _raw_mode(image: Image.Image) -> str:
    """Pillow's raw mode of the pixels in the file, or ""."""
    tiles = getattr(image, "tile", None)
    if not tiles:
        return ""
    arguments = tiles[0][3]
    return str(arguments[0] if isinstance(arguments, tuple) else arguments)


def _with(raw_mode: str, arguments: Any) -> Any:
    return (raw_mode, *arguments[1:]) if isinstance(arguments, tuple) else raw_mode


def to_eight_bits(values: np.ndarray, levels: Levels) -> np.ndarray:
    """Whole numbers of any type to uint8: black and below to 0, white and above to 255.

    Values above white bring a `BeyondWhite` warning.
    """
    low, high = levels
    if levels == SIXTEEN_BITS and values.dtype == np.uint16:
        return (values >> 8).astype(np.uint8)
    if values.size and values.max() > high:
        warnings.warn(f"values above {high}", BeyondWhite, stacklevel=2)
    wide = np.clip(values.astype(np.int64), low, high) - low
    # Every gray level stands for as many values; fewer values end in white too.
    factor, divisor = (256, high - low + 1) if high - low > 255 else (255, high - low)
    return (wide * factor // divisor).astype(np.uint8)


def trained_depth(setting: str | Depth, abouts: Sequence[Mapping[str, Any]]) -> str | Depth:
    """The depth to evaluate with: the setting, else that of the trainings, else still `auto`.

    Args:
        setting: `data.depth` of the evaluation.
        abouts: headers of the weights.

    Raises:
        UserError: the networks were trained with different ones.
    """
    if setting != AUTO:
        return setting
    known = {str(depth): depth for depth in map(recorded_depth, abouts) if depth is not None}
    if len(known) > 1:
        raise UserError(
            f"the backbones were trained with data.depth={' and '.join(sorted(known))}: "
            "choose one with data.depth="
        )
    return next(iter(known.values()), AUTO)


def recorded_depth(about: Mapping[str, Any]) -> Depth | None:
    """The depth that weights were trained with, or None; 16 bits for runs of older versions."""
    depth = about.get(RECORDED, 16 if "method" in about else None)
    checked = None if depth is None else check_depth(depth)
    return None if isinstance(checked, str) else checked


def depth_for(values: tuple[int, int]) -> Depth:
    """The depth that fits the least and the largest value of a data set.

    That is a number of bits, or with negative values both values. If all values are 0, it is 16
    bits; zeros and ones are a mask, black and white.
    """
    low, high = values
    if low == high == 0:
        return 16
    if (low, high) == (0, 1):
        return [0, 1]
    return max(_BITS[0], high.bit_length()) if low >= 0 else [low, max(high, low + 1)]


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
