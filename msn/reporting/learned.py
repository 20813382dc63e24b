"""The network of a run, some of its images and their features, for the report's pictures."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import normalize, to_tensor

from msn.data.pools import PoolSettings, build_pools
from msn.errors import UserError
from msn.evaluation.features import forward_feature
from msn.images.kinds import BadImageError
from msn.method.block import PackedBlock
from msn.method.positions import rotate
from msn.method.vit import VisionTransformer
from msn.schema import make
from msn.weights import Weights, build_trunk, read_weights
from msn.weights.backbone import centre_crop
from msn.weights.reading import newest_valid_checkpoint
from msn.weights.weights import IMAGENET_MEAN, IMAGENET_STD, prototype_cosines

_BATCH = 64


class Learned(NamedTuple):
    """A trained network and some of the images that it was trained on."""

    trunk: VisionTransformer
    settings: Mapping[str, Any]
    images: list[Image.Image]
    """As the network sees them: the evaluation's crop, RGB."""
    names: list[str]
    labels: np.ndarray | None
    """Class numbers, [n]."""
    classes: list[str]
    features: Tensor
    """Class tokens before the final norm (paper A.2), [n, D]."""
    assignments: Tensor | None
    """Cosines to the prototypes, [n, K]; None where no checkpoint holds the head."""

    def inputs(self, most: int) -> Tensor:
        """The first images, normalised for the network, [n, 3, S, S]."""
        return _as_input(self.images[:most], self.trunk)

    def attention(self, chosen: list[int]) -> Tensor:
        """Attention of the class token in the last block, [n, heads, rows, columns]."""
        with torch.no_grad():
            pixels = _as_input([self.images[i] for i in chosen], self.trunk)
            return class_attention(self.trunk, pixels)


def look(
    directory: Path, settings: Mapping[str, Any], *, most: int, device: torch.device
) -> Learned:
    """Open the network and images of a run, and compute the features of the images.

    Args:
        directory: of the run.
        settings: its resolved configuration.
        most: training images to look at.
        device: that computes.

    Raises:
        UserError: if there are no weights, or the images are no longer where they were.
    """
    weights = _newest_weights(directory, settings)
    trunk = build_trunk(weights).float().to(device)
    pool = build_pools(make("data", settings["data"], PoolSettings)).train
    crop = centre_crop(trunk.img_size)
    chosen = np.linspace(0, len(pool) - 1, min(most, len(pool))).round().astype(np.int64)
    kept, images = [], []
    for i in chosen.tolist():
        try:
            images.append(crop(pool.source.rgb(int(pool.positions[i]))))
        except BadImageError:  # the run has reported it, and a picture can do without
            continue
        kept.append(i)
    if not images:
        raise UserError(f"{pool.source.where}: no image can be read")
    features, assignments = _project(trunk, weights, images, device)
    return Learned(
        trunk,
        settings,
        images,
        [pool.name(i) for i in kept],
        None if pool.labels is None else pool.labels[kept],
        pool.source.classes,
        features,
        assignments,
    )


def class_attention(trunk: VisionTransformer, pixels: Tensor) -> Tensor:
    """Attention of the class token to the patches in the last block.

    Args:
        trunk: in eval mode.
        pixels: normalised images, [B, 3, S, S].

    Returns:
        [B, heads, rows, columns]; each head sums to 1 minus the weights of the other tokens.
    """
    block = trunk.blocks[-1]
    assert isinstance(block, PackedBlock)
    several = trunk.depth > 1
    tokens = trunk.forward_intermediates(pixels, 2)[0] if several else trunk.embed(pixels, None)
    packed = F.linear(block.norm1(tokens), *block.qkv())  # [B, L, 3D]
    heads = packed.unflatten(-1, (3, trunk.num_heads, -1)).permute(2, 0, 3, 1, 4)
    query, key = heads[0][:, :, :1], heads[1]  # [B, heads, 1 or L, d]
    if (turns := trunk.turns([pixels], [None])) is not None:
        key = rotate(key, turns[0])
    weights = (query @ key.mT * query.shape[-1] ** -0.5).softmax(dim=-1)
    rows = pixels.shape[-2] // trunk.patch_size
    return weights[:, :, 0, trunk.num_prefix_tokens :].unflatten(-1, (rows, -1))


def _newest_weights(directory: Path, settings: Mapping[str, Any]) -> Weights:
    """A checkpoint, which holds head and prototypes; else the backbone alone."""
    newest = newest_valid_checkpoint(directory / "checkpoints")
    return read_weights(newest or directory, num_heads=settings["model"]["num_heads"])


def _as_input(images: list[Image.Image], trunk: VisionTransformer) -> Tensor:
    """Images that are cropped already, as evaluation normalises them."""
    rows = [normalize(to_tensor(image), IMAGENET_MEAN, IMAGENET_STD) for image in images]
    return torch.stack(rows).to(trunk.cls_token.device)


@torch.no_grad()
def _project(
    trunk: VisionTransformer, weights: Weights, images: list[Image.Image], device: torch.device
) -> tuple[Tensor, Tensor | None]:
    features, tokens = [], []
    for start in range(0, len(images), _BATCH):
        pixels = _as_input(images[start : start + _BATCH], trunk)
        features.append(forward_feature(trunk, pixels, "class_token").cpu())
        tokens.append(trunk.norm(features[-1].to(device)))
    if weights.head is None or weights.prototypes is None:
        return torch.cat(features), None
    return torch.cat(features), prototype_cosines(weights, torch.cat(tokens)).cpu()
