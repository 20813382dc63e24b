"""The reference back end: views one image at a time through Pillow, as the published code does.

It is slow; the batched back end is tested against it.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter
from torch import Tensor
from torchvision.transforms.functional import adjust_hue

from msn.data.dataset import ImageBatch
from msn.data.views import (
    BRIGHTNESS,
    COLUMNS,
    CONTRAST,
    HUE,
    IMAGENET_MEAN,
    IMAGENET_STD,
    JITTER_ORDERS,
    SATURATION,
    ViewParameters,
    Views,
    ViewSettings,
)

_ENHANCERS = {
    BRIGHTNESS: ("brightness", ImageEnhance.Brightness),
    CONTRAST: ("contrast", ImageEnhance.Contrast),
    SATURATION: ("saturation", ImageEnhance.Color),
}


def make_reference_views(
    batch: ImageBatch, settings: ViewSettings, *, device: torch.device, dtype: torch.dtype
) -> Views:
    """Make the views of a batch on the CPU, one by one, and bring them to the device.

    Args:
        batch: decoded images with parameters, on the CPU.
        settings: of the views.
        device: where the views go.
        dtype: of the views.

    Returns:
        Normalised views.
    """
    images = [Image.fromarray(batch.image(i).numpy()) for i in range(len(batch.indices))]
    parameters = ViewParameters(batch.table.numpy())
    size = [settings.size_of(view) for view in range(settings.num_views)]
    rows = [
        torch.stack([apply_view(im, parameters, v, b, size[v]) for b, im in enumerate(images)])
        for v in range(settings.num_views)
    ]
    rand = 1 + settings.rand_views
    s, small = settings.rand_size, settings.focal_side
    return Views(
        target=_normalise(rows[0]).to(device, dtype),
        rand=_normalise(_stack(rows[1:rand], len(images), s)).to(device, dtype),
        focal=_normalise(_stack(rows[rand:], len(images), small)).to(device, dtype),
    )


def apply_view(
    image: Image.Image, parameters: ViewParameters, view: int, item: int, size: int
) -> Tensor:
    """Make one view of one RGB image, uint8 [3, size, size]."""
    p = {name: float(getattr(parameters, name)[view, item]) for name in COLUMNS}
    left, top = int(p["left"]), int(p["top"])
    image = image.crop((left, top, left + int(p["width"]), top + int(p["height"])))
    image = image.resize((size, size), Image.Resampling.BILINEAR)
    if p["flip"]:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for change in JITTER_ORDERS[int(p["order"])]:
        if change == HUE:
            image = adjust_hue(image, p["hue"]) if p["hue"] != 0 else image
        else:
            name, enhancer = _ENHANCERS[int(change)]
            image = enhancer(image).enhance(p[name]) if p[name] != 1 else image
    if p["gray"]:
        image = image.convert("L").convert("RGB")
    if p["blur"] > 0:
        # Pillow 13 refuses tensors as a radius, which the published code passes.
        image = image.filter(ImageFilter.GaussianBlur(radius=p["blur"]))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _stack(rows: list[Tensor], count: int, size: int) -> Tensor:
    return torch.stack(rows) if rows else torch.empty((0, count, 3, size, size), dtype=torch.uint8)


def _normalise(pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (pixels.float() / 255 - mean) / std
