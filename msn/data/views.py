"""The settings of views, and the random parameters of each view; back ends apply them.

The parameters (crop box, flip, colour factors and their order, gray, blur radius) are a function of
(seed, epoch, image index, view) alone: not of workers, processes, batch or back end. View order
everywhere: the target first, then rand anchors, then focal anchors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Annotated, Any, NamedTuple

import numpy as np
from torch import Tensor

from msn.data.sampler import BatchKey, uniform
from msn.errors import UserError
from msn.schema import Range, check_ranges, make

# Views and evaluation images are normalised alike, as every published MSN backbone expects.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

CROP_TRIES = 10  # torchvision's RandomResizedCrop gives up after ten draws and takes the centre
JITTER_ORDERS = np.array(list(permutations(range(4))))  # [24, 4]
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # what the numbers in JITTER_ORDERS mean

# Columns of the table of view parameters; one table travels to the device as one copy.
COLUMNS = (
    *("top", "left", "height", "width", "flip"),
    *("brightness", "contrast", "saturation", "hue", "order", "gray", "blur"),
)
_COLUMN = {name: number for number, name in enumerate(COLUMNS)}
# Columns of the four colour changes by their numbers, and the factors that change nothing.
FACTORS = [_COLUMN[name] for name in ("brightness", "contrast", "saturation", "hue")]
NO_CHANGE = np.array([1.0, 1.0, 1.0, 0.0], np.float32)


class Views(NamedTuple):
    """The views of B images, normalised, in the model's dtype."""

    target: Tensor  # [B, 3, S, S]
    rand: Tensor  # [R, B, 3, S, S]
    focal: Tensor  # [F, B, 3, s, s]
    origin: BatchKey | None = None  # the images of the training set, where known


_Chance = Annotated[float, Range(0, 1)]
_Strength = Annotated[float, Range(0)]


@dataclass(frozen=True, kw_only=True)
class ViewSettings:
    """Settings of the views; the values live in `configs/data/views/*.yaml`.

    Raises:
        UserError: a value is outside its range.
    """

    rand_views: Annotated[int, Range(0)]  # anchors of `rand_size` px beside the one target
    focal_views: Annotated[int, Range(0)]  # small zoomed anchors
    rand_size: Annotated[int, Range(1)]  # side of target and rand views in px
    focal_size: int | None  # side of focal views in px, see `focal_side`
    patch_size: Annotated[int, Range(1)]  # side of the model's patches in px; divides both sizes
    # Least and greatest share of the image's area in a crop.
    rand_scale: Annotated[Sequence[float], Range(0, 1, above_low=True)]
    focal_scale: Annotated[Sequence[float], Range(0, 1, above_low=True)]
    # Least and greatest width / height of a crop before resizing.
    ratio: Annotated[Sequence[float], Range(0, above_low=True)]
    flip_probability: _Chance  # of a left-right flip
    jitter_probability: _Chance  # that the four colour changes happen at all
    # Factors are uniform in [max(0, 1 - strength), 1 + strength].
    brightness: _Strength
    contrast: _Strength
    saturation: _Strength
    hue: Annotated[float, Range(0, 0.5)]  # turns of the colour circle are uniform in [-hue, hue]
    gray_probability: _Chance  # that the view loses its colours
    blur_probability: _Chance  # of a Gaussian blur
    # Least and greatest radius (standard deviation) of that blur in px.
    blur_radius: Annotated[Sequence[float], Range(0)]

    def __post_init__(self) -> None:
        check_ranges("data.views", self)
        for name, size in {"rand_size": self.rand_size, "focal_size": self.focal_side}.items():
            if size < 1 or size % self.patch_size:
                raise UserError(
                    f"data.views.{name}={size}: must be a multiple of the patch size "
                    f"{self.patch_size}"
                )

    @property
    def focal_side(self) -> int:
        """Side of focal views in px.

        Without a `focal_size` it is 3/7 of `rand_size` (96 of 224, as in the paper), rounded to a
        multiple of `patch_size`.
        """
        if self.focal_size is not None:
            return self.focal_size
        return max(1, round(self.rand_size * 96 / 224 / self.patch_size)) * self.patch_size

    @property
    def num_views(self) -> int:
        """Views of one image, the target included."""
        return 1 + self.rand_views + self.focal_views

    def size_of(self, view: int) -> int:
        """Side in px of view number `view` (0 is the target)."""
        return self.rand_size if view <= self.rand_views else self.focal_side


def view_settings(settings: Mapping[str, Any]) -> ViewSettings:
    """The settings at `data.views`, checked.

    Raises:
        UserError: a key is unknown or missing, or a value is of a wrong type or out of its range.
    """
    return make("data.views", settings, ViewSettings, complete=True)


class ViewParameters:
    """Parameters of V views of each of B images, as one table float32 [V, B, columns].

    Boxes are in whole pixels of the decoded image. A factor of exactly 1, a hue of 0 and a blur of
    0 mean that the change does not happen; `order` is a row number of `JITTER_ORDERS`.
    """

    def __init__(self, table: np.ndarray) -> None:
        self.table = table

    def __getattr__(self, name: str) -> np.ndarray:
        """The column of that name, float32 [V, B]."""
        if name not in _COLUMN:
            raise AttributeError(name)
        return self.table[..., _COLUMN[name]]


def draw_parameters(
    settings: ViewSettings,
    *,
    seed: int,
    epoch: int,
    indices: np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
) -> ViewParameters:
    """Draw the parameters of every view of a batch (torchvision's distributions).

    Args:
        settings: of the views.
        seed: of the run.
        epoch: counts from 0.
        indices: of the images in the data set, int [B].
        heights: of the images in px, int [B].
        widths: of the images in px, int [B].

    Returns:
        Parameters with a table [V, B, columns]; a row depends on its own image and view alone.
    """
    num_draws = 4 * CROP_TRIES + 10
    view = np.arange(settings.num_views)[:, None, None]
    draws = uniform(seed, epoch, np.asarray(indices)[:, None], view, np.arange(num_draws))
    table = np.empty((*draws.shape[:2], len(COLUMNS)), np.float32)
    crops, rest = draws[..., : 4 * CROP_TRIES], draws[..., 4 * CROP_TRIES :]
    large = slice(0, 1 + settings.rand_views)
    small = slice(1 + settings.rand_views, None)
    for views, scale in ((large, settings.rand_scale), (small, settings.focal_scale)):
        tries = crops[views].reshape(*crops[views].shape[:2], CROP_TRIES, 4)
        table[views, :, :4] = _draw_boxes(tries, scale, settings.ratio, heights, widths)

    columns = {name: table[..., number] for name, number in _COLUMN.items()}
    columns["flip"][:] = rest[..., 0] < settings.flip_probability
    jitter = rest[..., 1] < settings.jitter_probability
    for slot, name in enumerate(("brightness", "contrast", "saturation"), start=2):
        strength = getattr(settings, name)
        low, high = max(0.0, 1.0 - strength), 1.0 + strength
        columns[name][:] = np.where(jitter, low + (high - low) * rest[..., slot], 1.0)
    columns["hue"][:] = np.where(jitter, settings.hue * (2 * rest[..., 5] - 1), 0.0)
    columns["order"][:] = np.floor(rest[..., 6] * len(JITTER_ORDERS))
    columns["gray"][:] = rest[..., 7] < settings.gray_probability
    low, high = settings.blur_radius
    blurred = rest[..., 8] < settings.blur_probability
    columns["blur"][:] = np.where(blurred, low + (high - low) * rest[..., 9], 0.0)
    return ViewParameters(table)


_NO_VIEW = -1  # keeps the noise's draws apart from those of the views


def draw_noise(*, seed: int, epoch: int, indices: np.ndarray, count: int) -> np.ndarray:
    """Draw numbers in [0, 1) by which MAE chooses the patches of each image, float32 [B, count].

    Args:
        seed: of the run.
        epoch: counts from 0.
        indices: of the images in the data set, int [B].
        count: numbers per image; a row depends on its own image alone.
    """
    draws = uniform(seed, epoch, np.asarray(indices)[:, None], _NO_VIEW, np.arange(count))
    return draws.astype(np.float32)


def _draw_boxes(
    tries: np.ndarray,
    scale: Sequence[float],
    ratio: Sequence[float],
    heights: np.ndarray,
    widths: np.ndarray,
) -> np.ndarray:
    """RandomResizedCrop's algorithm, vectorised: tries [V, B, 10, 4] to boxes [V, B, 4].

    A box is top, left, height, width. The first of ten tries that fits is taken; if none does, the
    largest central box with an allowed ratio.
    """
    height = np.asarray(heights, np.float64)[:, None]
    width = np.asarray(widths, np.float64)[:, None]
    area = height * width * (scale[0] + (scale[1] - scale[0]) * tries[..., 0])
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    aspect = np.exp(log_low + (log_high - log_low) * tries[..., 1])
    w, h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.argmax(-1)[..., None]
    w, h, y, x = (
        np.take_along_axis(a, first, -1)[..., 0] for a in (w, h, tries[..., 2], tries[..., 3])
    )
    height, width = height[:, 0], width[:, 0]
    top, left = np.floor(y * (height - h + 1)), np.floor(x * (width - w + 1))

    image_ratio = width / height
    central_w = np.where(image_ratio > ratio[1], np.rint(height * ratio[1]), width)
    central_h = np.where(image_ratio < ratio[0], np.rint(width / ratio[0]), height)
    # A strip one pixel wide rounds to a box without height in torchvision, which then fails.
    central_w, central_h = np.maximum(central_w, 1), np.maximum(central_h, 1)
    central = (height - central_h) // 2, (width - central_w) // 2, central_h, central_w
    found = fits.any(-1)
    drawn = (top, left, h, w)
    return np.stack([np.where(found, a, b) for a, b in zip(drawn, central, strict=True)], -1)
