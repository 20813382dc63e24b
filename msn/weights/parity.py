"""Does another library compute from an export what we compute? On fixed images, on the CPU.

Features compared are all tokens after the final norm, [B, 1 + N, D].
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from msn.errors import UserError
from msn.method.vit import VisionTransformer
from msn.weights.classifier import Classifier, layer_norm_factor, predict

TOLERANCE = 1e-5
# Where a model's own float32 rounding is coarser than TOLERANCE, two right implementations differ
# by about that much; a wrong conversion differs by orders of magnitude more.
ROUNDING_FACTOR = 4
HALF_TYPES = (torch.bfloat16, torch.float16)
IMAGES = "2 of noise, 2 smooth; seed 0"


@dataclass(frozen=True)
class Loaded:
    """An export as another library loaded it."""

    library: str
    """Name and version."""
    variant: str
    """Which of the library's ways, e.g. its attention implementation; may be empty."""
    features: Callable[[Tensor], Tensor]
    """Images [B, 3, S, S] to tokens [B, 1 + N, D], or to logits [B, C] with a head."""
    module: nn.Module | None = None
    """What to cast for half precision; None where the format is float32 only."""
    other_sizes: bool = False
    """Whether it takes images of another size than the native one."""


def fixed_images(size: int) -> Tensor:
    """The images of every comparison, as after normalisation, [4, 3, size, size]."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 3, size, size, generator=generator)
    ramp = torch.linspace(-2, 2, size)
    smooth = torch.stack([ramp.expand(size, size), torch.cos(3 * ramp)[:, None] * ramp])
    return torch.cat([noise, smooth[:, None].expand(-1, 3, -1, -1)])


def bytes_of_scores(tokens: int, heads: int) -> int:
    """What eager attention takes for the fixed images: scores, and their softmax, in float32."""
    return 2 * 4 * len(fixed_images(1)) * heads * tokens**2


def other_size(trunk: VisionTransformer) -> int:
    """A second image size: 96 px for patches of 16 at 224, as focal views are."""
    side = trunk.img_size // trunk.patch_size
    return trunk.patch_size * max(1, side * 3 // 7)


@torch.no_grad()
def check(
    trunk: VisionTransformer, head: Classifier | None, loaded: list[Loaded]
) -> dict[str, Any]:
    """Compare features, or with a head logits, of an export as loaded with ours.

    Args:
        trunk: ours, float32, in eval mode.
        head: the classifier in the export, if any.
        loaded: the export in another library, in each way to be compared.

    Returns:
        Plain data for `parity.json`.

    Raises:
        UserError: if any difference is above its tolerance.
    """
    comparisons = []
    for other in loaded:
        sizes = [trunk.img_size] + ([other_size(trunk)] if other.other_sizes else [])
        for size in sizes:
            comparison = _compare(trunk, head, other, fixed_images(size))
            comparisons.append({"variant": other.variant, "image_size": size, **comparison})
    failed = [row for row in comparisons if not _passes(row)]
    if failed:
        worst = max(failed, key=lambda row: row["max_abs_difference"])
        raise UserError(
            f"parity with {loaded[0].library} failed at {worst['image_size']} px: max difference "
            f"{worst['max_abs_difference']:.2e}, allowed {worst['tolerance']:.0e}; nothing written"
        )
    return {
        "checked_with": loaded[0].library,
        "compared": "tokens after the final norm" if head is None else "logits of the head",
        "images": IMAGES,
        "max_abs_difference": max(row["max_abs_difference"] for row in comparisons),
        "mean_abs_difference": max(row["mean_abs_difference"] for row in comparisons),
        "tolerance": max(row["tolerance"] for row in comparisons),
        "comparisons": comparisons,
        "half_precision": _half_precision(loaded[0], fixed_images(trunk.img_size)),
    }


def _compare(
    trunk: VisionTransformer, head: Classifier | None, other: Loaded, images: Tensor
) -> dict[str, Any]:
    ours, theirs = _ours(trunk, head, images), other.features(images)
    if ours.shape != theirs.shape:
        raise UserError(
            f"parity with {other.library} failed: shape {list(theirs.shape)} instead of "
            f"{list(ours.shape)}; nothing written"
        )
    difference = (ours - theirs).abs()
    row = {
        "max_abs_difference": float(difference.max()),
        "mean_abs_difference": float(difference.mean()),
        "tolerance": TOLERANCE,
    }
    if row["max_abs_difference"] > TOLERANCE:
        exact = _ours(copy.deepcopy(trunk).double(), head, images.double())
        row["float32_rounding"] = float((ours - exact).abs().max())
        row["tolerance"] = max(TOLERANCE, ROUNDING_FACTOR * row["float32_rounding"])
    if head is not None:
        row["same_predictions"] = _same_predictions(trunk, head, images, theirs)
    return row


def _ours(trunk: VisionTransformer, head: Classifier | None, images: Tensor) -> Tensor:
    if head is None:
        return trunk.forward_features(images, norm=True)
    tokens = trunk.forward_features(images, norm=False)[:, 0]
    # What eps takes away is an image's own factor: it is in the export by construction.
    return predict(head, tokens, trunk.norm) * layer_norm_factor(head, tokens)


def _same_predictions(
    trunk: VisionTransformer, head: Classifier, images: Tensor, theirs: Tensor
) -> bool:
    """Whether the top class is the same, or is tied within the tolerance."""
    ours = predict(head, trunk.forward_features(images, norm=False)[:, 0], trunk.norm)
    chosen = ours.gather(1, theirs.argmax(dim=1, keepdim=True))
    return bool((ours.amax(dim=1, keepdim=True) - chosen <= TOLERANCE).all())


def _passes(row: dict[str, Any]) -> bool:
    # Written so that NaN fails.
    within = row["max_abs_difference"] <= row["tolerance"]
    return within and row.get("same_predictions", True)


def _half_precision(loaded: Loaded, images: Tensor) -> dict[str, Any]:
    """How far the export moves from its own float32 features in bfloat16 and float16."""
    if loaded.module is None:
        return {}
    full, report = loaded.features(images), {}
    original = copy.deepcopy(loaded.module.state_dict())
    for dtype in HALF_TYPES:
        loaded.module.to(dtype)
        difference = (loaded.features(images.to(dtype)).float() - full).abs()
        report[str(dtype).removeprefix("torch.")] = {
            "max_abs_difference": _finite(difference.max()),
            "mean_abs_difference": _finite(difference.mean()),
        }
        loaded.module.float().load_state_dict(original)
    return report


def _finite(value: Tensor) -> float | str:
    """JSON knows no infinity; float16 may overflow."""
    return float(value) if bool(value.isfinite()) else "not finite"
