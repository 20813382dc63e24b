"""The contact sheet of views: what target and anchors see of an image, dropped patches greyed."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from msn.data.views import IMAGENET_MEAN, IMAGENET_STD, Views

# Sides in px on the sheet of large views; small images are enlarged so that a person sees them.
LEAST_SIDE, GREATEST_SIDE = 96, 224
_GAP, _CAPTION = 6, 18
_PAPER, _INK, _DROPPED = (255, 255, 255), (60, 60, 60), (128, 128, 128)
# Captions that can be read on light and on dark ground.
_NO_PAPER, _INK_ON_ANY = (0, 0, 0, 0), (128, 128, 128, 255)


def views_sheet(
    views: Views,
    kept: Tensor | None,
    *,
    patch_size: int,
    originals: Sequence[Image.Image] | None = None,
    transparent: bool = False,
) -> Image.Image:
    """Draw a row an image: the original if given, the target, rand anchors, focal anchors.

    Patches that a rand anchor does not see are covered in grey.

    Args:
        views: normalised views of B images.
        kept: patches that rand anchors keep, [M] or [R, B, M]; None keeps all.
        patch_size: side of a patch in px of the views.
        originals: the B images before they were cut, any size.
        transparent: leave the ground between the views out (RGBA), for pages in light and dark.

    Returns:
        An RGB image, or RGBA if `transparent`; views of `rand_size` px are drawn with a side of 96
        to 224 px, focal views in the same scale.
    """
    size, images = views.target.shape[-1], views.target.shape[0]
    side = min(max(size, LEAST_SIDE), GREATEST_SIDE)
    small_side = round(side * views.focal.shape[-1] / size)
    rows = []
    for i in range(images):
        cells = [] if originals is None else [_contained(originals[i], side)]
        cells.append(_drawn(picture(views.target[i]), side))
        for r, view in enumerate(views.rand[:, i]):
            masked = cover_dropped(picture(view), _kept_of(kept, r, i), patch_size)
            cells.append(_drawn(masked, side))
        cells += [_drawn(picture(view), small_side) for view in views.focal[:, i]]
        rows.append(cells)
    captions = [] if originals is None else ["original"]
    captions += ["target", *["rand"] * len(views.rand), *["focal"] * len(views.focal)]
    return _tiled(rows, captions, transparent=transparent)


def picture(view: Tensor) -> np.ndarray:
    """A normalised view [3, h, w] as pixels, uint8 [h, w, 3]."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    pixels = (view.detach().float().cpu() * std + mean).clamp(0, 1) * 255
    return pixels.round().to(torch.uint8).permute(1, 2, 0).numpy()


def cover_dropped(pixels: np.ndarray, kept: Tensor | None, patch_size: int) -> np.ndarray:
    """Paint grey what is not kept.

    Args:
        pixels: uint8 [h, w, 3].
        kept: 0-based row-major numbers of the patches that stay, [M]; None is all.
        patch_size: side of a patch in px.

    Returns:
        A painted copy.
    """
    if kept is None:
        return pixels
    rows, columns = (side // patch_size for side in pixels.shape[:2])
    seen = np.zeros(rows * columns, bool)
    seen[kept.cpu().numpy()] = True
    mask = seen.reshape(rows, columns).repeat(patch_size, 0).repeat(patch_size, 1)
    return np.where(mask[..., None], pixels, np.uint8(_DROPPED[0]))


def _kept_of(kept: Tensor | None, rand_view: int, image: int) -> Tensor | None:
    return kept if kept is None or kept.ndim == 1 else kept[rand_view, image]


def _drawn(pixels: np.ndarray, side: int) -> Image.Image:
    """Enlarged without smoothing, so that pixels and patches stay visible; reduced with it."""
    enlarge = pixels.shape[0] <= side
    how = Image.Resampling.NEAREST if enlarge else Image.Resampling.LANCZOS
    return Image.fromarray(pixels).resize((side, side), how)


def _contained(image: Image.Image, side: int) -> Image.Image:
    image = image.convert("RGB")
    scale = side / max(image.size)
    width, height = (max(1, round(length * scale)) for length in image.size)
    how = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    return image.resize((width, height), how)


def _tiled(rows: list[list[Image.Image]], captions: list[str], *, transparent: bool) -> Image.Image:
    """Columns as wide as their widest cell, a caption above each."""
    widths = [max(max(cell.width for cell in column), 40) for column in zip(*rows, strict=True)]
    heights = [max(cell.height for cell in row) for row in rows]
    size = (
        sum(widths) + _GAP * (len(widths) + 1),
        _CAPTION + sum(heights) + _GAP * (len(heights) + 1),
    )
    sheet = Image.new("RGBA", size, _NO_PAPER) if transparent else Image.new("RGB", size, _PAPER)
    ink = _INK_ON_ANY if transparent else _INK
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    lefts = [_GAP + sum(widths[:i]) + _GAP * i for i in range(len(widths))]
    for left, caption in zip(lefts, captions, strict=True):
        draw.text((left, 3), caption, fill=ink, font=font)
    top = _CAPTION + _GAP
    for row, height in zip(rows, heights, strict=True):
        for left, cell in zip(lefts, row, strict=True):
            sheet.paste(cell, (left, top))
        top += height + _GAP
    return sheet
