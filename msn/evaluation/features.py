"""Frozen features: what classifiers are fitted on (paper A.2)."""

from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from msn.data.dataset import LabelledImages
from msn.errors import UserError
from msn.method.vit import VisionTransformer

FEATURES = ("class_token", "class_token_norm", "patch_mean")


class _Transformed(Dataset[Tensor]):
    def __init__(self, images: LabelledImages, transform: Callable[[Image.Image], Tensor]) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Tensor:
        return self.transform(self.images[i])


@torch.inference_mode()
def extract_features(
    trunk: VisionTransformer,
    images: LabelledImages,
    *,
    transform: Callable[[Image.Image], Tensor],
    feature: str,
    batch_size: int,
    num_workers: int,
    device: torch.device,
) -> Tensor:
    """Features of all images, in their order, float32 [n, D] on the CPU.

    Args:
        trunk: moved to `device` and left there, in eval mode.
        images: labelled images.
        transform: from an image to [3, S, S].
        feature: "class_token" of the last block before the last norm (the paper's),
            "class_token_norm" after it, or "patch_mean", the mean of patch tokens after it.
        batch_size: images a forward pass, >= 1.
        num_workers: processes that read and transform images.
        device: where the forward passes run.

    Raises:
        UserError: if the feature is unknown or features are not finite.
    """
    check_feature(feature)
    trunk = trunk.to(device).eval()
    transformed = _Transformed(images, transform)
    loader = DataLoader(transformed, batch_size=batch_size, num_workers=num_workers)
    parts = [_features(trunk, batch.to(device), feature).float().cpu() for batch in loader]
    features = torch.cat(parts)
    if not bool(torch.isfinite(features).all()):
        raise UserError("the backbone's features hold NaN or infinite values")
    return features


def pixel_features(
    images: LabelledImages, *, transform: Callable[[Image.Image], Tensor], num_workers: int
) -> Tensor:
    """The transformed pixels themselves, the baseline of every table, float32 [n, 3 * S * S]."""
    transformed = _Transformed(images, transform)
    loader = DataLoader(transformed, batch_size=64, num_workers=num_workers)
    return torch.cat([batch.flatten(1) for batch in loader])


def check_feature(feature: str) -> None:
    """Refuse a kind of feature that does not exist.

    Raises:
        UserError: with the kinds that do.
    """
    if feature not in FEATURES:
        raise UserError(f"protocol.feature must be one of {', '.join(FEATURES)}, got {feature}")


def _features(trunk: VisionTransformer, images: Tensor, feature: str) -> Tensor:
    if feature == "class_token":
        return trunk.forward_features(images, norm=False)[:, 0]
    tokens = trunk.forward_features(images, norm=True)
    return tokens[:, 0] if feature == "class_token_norm" else tokens[:, 1:].mean(dim=1)
