"""`backbone.safetensors`, and the backbone as people use it: an nn.Module with its transform."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from msn.data.depth import levels_of, recorded_depth
from msn.method.vit import VisionTransformer
from msn.weights.files import save_tensors
from msn.weights.preprocessing import image_transform
from msn.weights.reading import read_weights
from msn.weights.weights import (
    FORMAT,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Weights,
    check_heads,
    say_notes,
)


class Backbone(VisionTransformer):
    """A pretrained trunk in float32: images in, features out; its state dict has timm's names.

    Args:
        weights: as `read_weights` gives them.

    Attributes:
        transform: from a path, a PIL image of any mode or a uint8 tensor [3, H, W] to the tensor
            [3, S, S] that the trunk was made for; EXIF rotation is applied, see `image_transform`.
        meta: what the file says about itself (epoch, data, method, licence, ...).
    """

    def __init__(self, weights: Weights) -> None:
        super().__init__(**weights.model)  # type: ignore[arg-type]
        self.load_state_dict(weights.trunk, strict=True)
        self.meta = weights.meta
        self.transform = image_transform(
            self.img_size,
            mean=weights.meta.get("mean", IMAGENET_MEAN),
            std=weights.meta.get("std", IMAGENET_STD),
            levels=levels_of(recorded_depth(weights.meta)),
        )

    def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]
        """Class tokens after the final norm, [B, 3, h, w] -> [B, D], as timm's `num_classes=0`."""
        return self.forward_features(images)[:, 0]

    def forward_features(self, images: Tensor, *, norm: bool = True) -> Tensor:
        """All tokens, class token first, [B, 3, h, w] -> [B, 1 + N, D].

        Low-shot evaluation reads the class token with `norm=False` (paper A.2).
        """
        return super().forward_features(images, norm=norm)


def load_backbone(
    path: str | Path, *, num_heads: int | None = None, key: str | None = None
) -> Backbone:
    """Load the trunk of any supported file or directory for use, in eval mode.

    Args:
        path: see `read_weights`.
        num_heads: attention heads where the file cannot tell; what is assumed is told in a warning.
        key: which of several trunks in the file, see `read_weights`.

    Raises:
        UserError: see `read_weights`; or the file says another number of heads.
    """
    weights = read_weights(path, num_heads=num_heads, key=key)
    check_heads(weights, num_heads, str(path))
    say_notes(weights, str(path))
    return Backbone(weights).eval()


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
