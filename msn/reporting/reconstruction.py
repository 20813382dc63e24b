"""Draw what a masked autoencoder predicts: image, masked, reconstructed, mixed."""

import torch
from PIL import Image
from torch import Tensor

from msn.method.mae import patchify, unpatchify
from msn.reporting.pictures import (
    GREATEST_SIDE,
    LEAST_SIDE,
    Gallery,
    as_picture,
    cover_dropped,
    sized,
    tiled,
    view_pixels,
)
from msn.weights.mae import LoadedMAE
from msn.weights.weights import IMAGENET_MEAN, IMAGENET_STD

SHOWN = 8


@torch.no_grad()
def reconstruction_sheet(
    mae: LoadedMAE, images: Tensor, *, seed: int, transparent: bool = False
) -> Image.Image:
    """Draw one row per image: the image, its visible patches, the prediction, both together.

    Predictions of normalised patches (`norm_pix_loss`) become pixels by the mean and standard
    deviation of the true patch, which the network does not know, as in the paper's figures.

    Args:
        mae: the network, in eval mode.
        images: normalised as `mae.transform` does, [B, 3, S, S].
        seed: of the masks.
        transparent: see `views_sheet`.
    """
    size, patch = mae.trunk.img_size, mae.trunk.patch_size
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(len(images), (size // patch) ** 2, generator=generator)
    device = mae.trunk.cls_token.device
    images = images.to(device, mae.trunk.cls_token.dtype)
    found = mae(images, noise.to(device))
    patches, predicted = patchify(images, patch), found.prediction
    if mae.norm_pix_loss:
        variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        predicted = predicted * (variance + 1e-6).sqrt() + mean
    mixed = torch.where(found.mask.unsqueeze(-1).bool(), predicted, patches)
    side = min(max(size, LEAST_SIDE), GREATEST_SIDE)
    mean, std = mae.meta.get("mean", IMAGENET_MEAN), mae.meta.get("std", IMAGENET_STD)
    rows = []
    for image, whole, both, mask in zip(
        images, unpatchify(predicted, patch), unpatchify(mixed, patch), found.mask, strict=True
    ):
        kept = (mask == 0).nonzero()[:, 0]
        original, whole, both = (view_pixels(part, mean, std) for part in (image, whole, both))
        shown = (original, cover_dropped(original, kept, patch), whole, both)
        rows.append([sized(Image.fromarray(pixels), side) for pixels in shown])
    return tiled(rows, ["image", "masked", "reconstructed", "mixed"], transparent=transparent)


def reconstruction_caption(mae: LoadedMAE, count: int) -> str:
    """A caption of the sheet, for a page or a terminal."""
    side = mae.trunk.img_size // mae.trunk.patch_size
    masked = side**2 - mae.num_kept
    scale = (
        "; predictions are of normalised patches, scaled back by the mean and standard deviation "
        "of each true patch"
        if mae.norm_pix_loss
        else ""
    )
    return f"{count} images, {masked} of {side**2} patches masked{scale}"


def reconstruction_gallery(mae: LoadedMAE, images: Tensor) -> Gallery:
    """The sheet as a gallery.

    Args:
        mae: the network of a run.
        images: normalised, [B, 3, S, S]; the first ones are shown.
    """
    images = images[:SHOWN]
    told = reconstruction_caption(mae, len(images))
    sheet = reconstruction_sheet(mae, images, seed=0, transparent=True)
    return Gallery(
        "Reconstructions",
        "One row per training image: the image, the patches that the trunk sees, what the decoder "
        "predicts, and predictions beside visible patches. Visible patches are not trained on.",
        [as_picture(sheet, told, f"Contact sheet: {told}.")],
    )
