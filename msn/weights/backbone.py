"""`backbone.safetensors`, and the backbone as people use it: an nn.Module with its transform."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms.functional import to_pil_image

from msn.errors import UserError
from msn.images.decode import decode, full_size, upright_rgb
from msn.images.depth import SIXTEEN_BITS, Levels, levels_of, recorded_depth
from msn.images.kinds import BadImageError, read_file
from msn.method.vit import VisionTransformer
from msn.weights.families import NATIVE
from msn.weights.tensors import save_tensors
from msn.weights.weights import (
    FORMAT,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Weights,
    short_side,
)


class Backbone(VisionTransformer):
    """A pretrained trunk in float32: images in, features out; its state dict has timm's names.

    Args:
        weights: as `read_weights` gives them.

    Attributes:
        transform: from a path, a PIL image, a uint8 tensor [3, H, W] or array [H, W, 3] to what
            the trunk was made for, [3, S, S]; EXIF rotation is applied, see `image_transform`.
        native: what its family takes as the feature of an image, and who says so.
        meta: what the file says about itself (epoch, data, method, licence, ...).
    """

    def __init__(self, weights: Weights) -> None:
        super().__init__(**weights.model)
        self.load_state_dict(weights.trunk, strict=True)
        self.meta, self.native = weights.meta, weights.native
        self.transform = transform_of(weights)

    def resolve(self, kind: str) -> str:
        """The kind of feature that `native` stands for; others are what they are."""
        return self.native.feature if kind == NATIVE else kind

    def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]
        """Class tokens after the final norm, [B, 3, h, w] -> [B, D], as timm's `num_classes=0`.

        Of a fine-tuned MAE (`meta["pool"]` is "mean") the final norm of the mean of patches.
        """
        if self.meta.get("pool") == "mean":
            tokens = self.forward_features(images, norm=False)
            return self.norm(tokens[:, self.num_prefix_tokens :].mean(dim=1))
        return self.forward_features(images)[:, 0]

    def forward_features(self, images: Tensor, *, norm: bool = True) -> Tensor:
        """All tokens: class token, registers, patches, [B, 3, h, w] -> [B, 1 + R + N, D].

        Low-shot evaluation reads the class token with `norm=False` (paper A.2).
        """
        return super().forward_features(images, norm=norm)


def save_backbone(path: str | Path, trunk: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write `backbone.safetensors`: a trunk in timm's names that says what it is.

    Args:
        path: the file; replaced atomically.
        trunk: state dict of the `VisionTransformer`.
        meta: plain data; needs `model` (the six numbers). `mean` and `std` default to ImageNet's.

    Raises:
        UserError: if the file cannot be written; nothing is left then.
    """
    save_tensors(Path(path), trunk, {"msn": json.dumps(complete_meta(meta))})


def complete_meta(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The header that travels in every file we write."""
    model = dict(meta["model"])
    defaults = {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)}
    return {"format": FORMAT, "model": model, **defaults, **meta}


def transform_of(weights: Weights) -> "Callable[[Picture], Tensor]":
    """The `image_transform` that some weights were made for."""
    return image_transform(
        int(weights.model["img_size"]),
        mean=weights.meta.get("mean", IMAGENET_MEAN),
        std=weights.meta.get("std", IMAGENET_STD),
        levels=levels_of(recorded_depth(weights.meta)),
    )


# A centre crop never sees what is farther from the centre than half a short side; of longer images
# the rest is left out before they are resized, with room for the filter.
_LONGEST = 8  # times the short side

Picture = str | os.PathLike[str] | Image.Image | Tensor | np.ndarray


def image_transform(
    image_size: int,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    levels: Levels = SIXTEEN_BITS,
    whole: bool = False,
) -> Callable[[Picture], Tensor]:
    """Turn upright, resize the short side, centre crop, normalise (paper A.2).

    Args:
        image_size: side of the crop in px; the short side is `short_side(image_size)` before.
        mean: of each channel.
        std: likewise.
        levels: the values that are black and white in images of more than 8 bits.
        whole: no crop: the whole image is resized to the square.

    Returns:
        From an image to float32 [3, S, S]. An image is a path, a PIL image of any mode, a tensor
        uint8 [3, H, W], [1, H, W] or [H, W], or an array uint8 [H, W, 3] or [H, W]; EXIF rotation
        is applied, where there is any left. It raises a UserError for what is none of these or
        cannot be read.
    """
    crop = [
        trimmed,
        transforms.Resize(short_side(image_size)),
        transforms.CenterCrop(image_size),
    ]
    return transforms.Compose(
        [
            Opened(levels),
            *([transforms.Resize((image_size, image_size))] if whole else crop),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )


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


class Opened:
    """From what people have to an upright RGB image; a class, so that it travels to workers."""

    def __init__(self, levels: Levels) -> None:
        self.levels = levels

    def __call__(self, picture: Picture) -> Image.Image:
        """An upright RGB image; a UserError if it is not one or cannot be read."""
        if isinstance(picture, Tensor):
            return _from_tensor(picture)
        if isinstance(picture, np.ndarray):
            return _from_array(picture)
        if isinstance(picture, Image.Image) and 0 in picture.size:
            raise UserError(f"an image must have pixels, got {picture.size[0]} x {picture.size[1]}")
        if not isinstance(picture, Image.Image | str | os.PathLike):
            kind = type(picture).__name__
            raise UserError(
                f"an image must be a path, a PIL image, an array or a tensor, got {kind}"
            )
        try:
            if isinstance(picture, Image.Image):
                return upright_rgb(picture, self.levels)
            return Image.fromarray(decode(read_file(picture), full_size, self.levels).pixels)
        except BadImageError as error:
            raise UserError(f"{picture}: cannot be read ({error})") from None


def _from_array(picture: np.ndarray) -> Image.Image:
    shaped = picture.ndim == 2 or (picture.ndim == 3 and picture.shape[-1] == 3)
    if picture.dtype != np.uint8 or not shaped or 0 in picture.shape:
        raise UserError(
            f"an array must be uint8 [H, W, 3] or [H, W], got {picture.dtype} {list(picture.shape)}"
        )
    return Image.fromarray(np.ascontiguousarray(picture)).convert("RGB")


def _from_tensor(picture: Tensor) -> Image.Image:
    channels = 1 if picture.ndim < 3 else picture.shape[0]
    shaped = picture.ndim in (2, 3) and channels in (1, 3) and 0 not in picture.shape
    if picture.dtype != torch.uint8 or not shaped:
        raise UserError(
            "a tensor must be uint8 [3, H, W], [1, H, W] or [H, W], got "
            f"{str(picture.dtype).removeprefix('torch.')} {list(picture.shape)}"
        )
    return to_pil_image(picture.cpu()).convert("RGB")
