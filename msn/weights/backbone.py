"""`Backbone`, an nn.Module with its transform; `backbone.safetensors`; the image transform."""

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
from msn.weights.weights import FORMAT, IMAGENET_MEAN, IMAGENET_STD, Weights, short_side


class Backbone(VisionTransformer):
    """A pretrained trunk in float32: images in, features out; its state dict has timm's names.

    Args:
        weights: as `read_weights` gives them.

    Attributes:
        transform: from a path, a PIL image, a uint8 tensor [3, H, W] or array [H, W, 3] to the
            trunk's input [3, S, S]; EXIF rotation is applied, see `image_transform`.
        native: what its family takes as the feature of an image, and who says so.
        meta: what the file says about itself (epoch, data, method, licence, ...).
    """

    def __init__(self, weights: Weights) -> None:
        super().__init__(**weights.model)
        self.load_state_dict(weights.trunk, strict=True)
        self.meta, self.native = weights.meta, weights.native
        self.transform = transform_of(weights)

    def resolve(self, kind: str) -> str:
        """The feature of the family for `native`; any other kind is returned unchanged."""
        return self.native.feature if kind == NATIVE else kind

    def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]
        """Class tokens after the final norm, [B, 3, h, w] -> [B, D], as timm's `num_classes=0`.

        For a fine-tuned MAE (`meta["pool"]` is "mean"): the final norm of the mean of patches.
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
    """Write `backbone.safetensors`: a trunk in timm's names with a header.

    Args:
        path: the file; replaced atomically.
        trunk: state dict of the `VisionTransformer`.
        meta: plain data; needs `model` (the six numbers). `mean` and `std` default to ImageNet's.

    Raises:
        UserError: if the file cannot be written; nothing is left behind.
    """
    save_tensors(Path(path), trunk, {"msn": json.dumps(complete_meta(meta))})


def complete_meta(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The header of every weight file that we write."""
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


# A centre crop keeps a square. Of longer images the far ends are cut off before they are resized.
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
        whole: resize the whole image to the square instead of cropping.

    Returns:
        From an image to float32 [3, S, S]. An image is a path, a PIL image of any mode, a tensor
        uint8 [3, H, W], [1, H, W] or [H, W], or an array uint8 [H, W, 3] or [H, W]. EXIF rotation
        is applied if it has not been. It raises a UserError for anything else, and for an image
        that cannot be read.
    """
    squash = transforms.Resize((image_size, image_size))
    return transforms.Compose(
        [
            Opened(levels),
            squash if whole else centre_crop(image_size),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )


def centre_crop(image_size: int) -> Callable[[Image.Image], Image.Image]:
    """Resize the short side as `short_side` says, then crop a square of `image_size` px."""
    resize = transforms.Resize(short_side(image_size))
    return transforms.Compose([trimmed, resize, transforms.CenterCrop(image_size)])


def trimmed(image: Image.Image) -> Image.Image:
    """The middle of an image that is more than eight times as long as wide; others unchanged.

    Resized whole, an image of 60,000 x 1 px would take gigabytes, of which a crop keeps a square.
    """
    width, height = image.size
    most = _LONGEST * min(width, height)
    if max(width, height) <= most:
        return image
    left, top = max(0, width - most) // 2, max(0, height - most) // 2
    return image.crop((left, top, left + min(width, most), top + min(height, most)))


class Opened:
    """From any kind of `Picture` to an upright RGB image; a class, so that it can be pickled."""

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
