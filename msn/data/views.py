"""What a view is: its settings, and the numbers that make it, drawn apart from their application.

The numbers of a view (crop box, flip, colour factors and their order, gray, blur radius) are a
function of (seed, epoch, image index, view) alone: not of workers, processes, batch or back end.
View order everywhere: the target first, then rand anchors, then focal anchors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from msn.data.sampler import uniform
from msn.errors import UserError
from msn.schema import refuse_unknown, take

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
    """The views of B images, normalised, in the model's dtype.

    `target` [B, 3, S, S], `rand` [R, B, 3, S, S] and `focal` [F, B, 3, s, s].
    """

    target: Tensor
    rand: Tensor
    focal: Tensor


class ViewSettings:
    """Checked settings of the views; the values live in `configs/data/views/*.yaml`.

    Args:
        rand_views: anchor views of `rand_size` px beside the one target view, >= 0.
        focal_views: small zoomed anchor views, >= 0.
        rand_size: side of target and rand views in px.
        focal_size: side of focal views in px; None takes 3/7 of `rand_size` (96 of 224, as in the
            paper) rounded to a multiple of `patch_size`.
        patch_size: side of the model's patches in px; must divide both sizes.
        rand_scale: least and greatest share of the image's area in a rand crop, in (0, 1].
        focal_scale: the same for focal crops.
        ratio: least and greatest width / height of a crop before resizing.
        flip_probability: chance of a left-right flip.
        jitter_probability: chance that the four colour changes happen at all.
        brightness: factors are uniform in [max(0, 1 - brightness), 1 + brightness].
        contrast: the same for contrast.
        saturation: the same for saturation.
        hue: turns of the colour circle are uniform in [-hue, hue], hue in [0, 0.5].
        gray_probability: chance that the view loses its colours.
        blur_probability: chance of a Gaussian blur.
        blur_radius: least and greatest radius (standard deviation) of that blur, px.

    Raises:
        UserError: a value is outside its range.
    """

    def __init__(
        self,
        *,
        rand_views: int,
        focal_views: int,
        rand_size: int,
        focal_size: int | None,
        patch_size: int,
        rand_scale: Sequence[float],
        focal_scale: Sequence[float],
        ratio: Sequence[float],
        flip_probability: float,
        jitter_probability: float,
        brightness: float,
        contrast: float,
        saturation: float,
        hue: float,
        gray_probability: float,
        blur_probability: float,
        blur_radius: Sequence[float],
    ) -> None:
        self.rand_views = _whole("rand_views", rand_views, 0)
        self.focal_views = _whole("focal_views", focal_views, 0)
        if rand_views + focal_views == 0:
            raise UserError("data.views.rand_views + data.views.focal_views is 0: must be >= 1")
        self.patch_size = _whole("patch_size", patch_size, 1)
        self.rand_size = _side("rand_size", rand_size, patch_size)
        self.focal_size = _side(
            "focal_size",
            default_focal_size(rand_size, patch_size) if focal_size is None else focal_size,
            patch_size,
        )
        self.rand_scale = _interval("rand_scale", rand_scale, 0.0, 1.0, open_low=True)
        self.focal_scale = _interval("focal_scale", focal_scale, 0.0, 1.0, open_low=True)
        self.ratio = _interval("ratio", ratio, 0.0, math.inf, open_low=True)
        self.flip_probability = _within("flip_probability", flip_probability, 0.0, 1.0)
        self.jitter_probability = _within("jitter_probability", jitter_probability, 0.0, 1.0)
        self.brightness = _within("brightness", brightness, 0.0, math.inf)
        self.contrast = _within("contrast", contrast, 0.0, math.inf)
        self.saturation = _within("saturation", saturation, 0.0, math.inf)
        self.hue = _within("hue", hue, 0.0, 0.5)
        self.gray_probability = _within("gray_probability", gray_probability, 0.0, 1.0)
        self.blur_probability = _within("blur_probability", blur_probability, 0.0, 1.0)
        self.blur_radius = _interval("blur_radius", blur_radius, 0.0, math.inf)

    @property
    def num_views(self) -> int:
        """Views of one image, the target included."""
        return 1 + self.rand_views + self.focal_views

    def size_of(self, view: int) -> int:
        """Side in px of view number `view` (0 is the target)."""
        return self.rand_size if view <= self.rand_views else self.focal_size


def view_settings(settings: Mapping[str, Any]) -> ViewSettings:
    """What stands at `data.views`, checked.

    Raises:
        UserError: a key is unknown or missing, or a value is of a wrong type or out of its range.
    """
    refuse_unknown("data.views", settings, ViewSettings)
    return ViewSettings(**take("data.views", settings, ViewSettings))


def default_focal_size(rand_size: int, patch_size: int) -> int:
    """Scale the paper's 96 px beside 224 px to another size, as a multiple of the patch size."""
    return max(1, round(rand_size * 96 / 224 / patch_size)) * patch_size


class ViewParameters:
    """The numbers that make V views of each of B images, as one table float32 [V, B, columns].

    Boxes are whole pixels of the image the views are cut from. A factor of exactly 1, a hue of
    exactly 0 and a blur of exactly 0 mean that the change does not happen; `order` is a row number
    of `JITTER_ORDERS`.
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
    """Draw the numbers of every view of a batch.

    Args:
        settings: what may be drawn.
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


def _draw_boxes(
    tries: np.ndarray,
    scale: tuple[float, float],
    ratio: tuple[float, float],
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


def _whole(name: str, value: int, low: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise UserError(f"data.views.{name}={value}: must be a whole number >= {low}")
    return value


def _side(name: str, value: int, patch_size: int) -> int:
    if _whole(name, value, 1) % patch_size:
        raise UserError(
            f"data.views.{name}={value}: must be a multiple of the patch size {patch_size}"
        )
    return value


def _number(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise UserError(f"data.views.{name}={value}: must be a number")
    return float(value)


def _within(name: str, value: float, low: float, high: float) -> float:
    if not low <= _number(name, value) <= high:
        raise UserError(f"data.views.{name}={value}: must lie in [{low:g}, {high:g}]")
    return float(value)


def _interval(
    name: str, value: Sequence[float], low: float, high: float, *, open_low: bool = False
) -> tuple[float, float]:
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 2:
        raise UserError(f"data.views.{name}={value}: must be two numbers, least and greatest")
    least, greatest = (_number(name, v) for v in value)
    if not low <= least <= greatest <= high or (open_low and least <= low):
        bracket = "(" if open_low else "["
        raise UserError(
            f"data.views.{name}={list(value)}: must be least <= greatest, both in "
            f"{bracket}{low:g}, {high:g}]"
        )
    return least, greatest
