"""What a training step costs, counted from the model's numbers alone.

Legend: N patches, L = 1 + N tokens, D embedding width, P projection width, K prototypes.

A multiplication with its addition counts as two operations. The count is nominal: kept patches
through all blocks in full, backward = 2 x forward; softmax, norms, GELU, loss, optimiser and EMA
count nothing. Work that is saved exactly (the last block takes the class token alone) therefore
counts as speed, and recomputation under `chunk_size` counts as slowness.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from msn.method.masking import num_kept_patches


class Flops(NamedTuple):
    """Floating-point operations of one image in one training step, by kind of view."""

    target: float
    """The target view, forward."""
    rand: float
    """All rand anchors, forward and backward."""
    focal: float
    """All focal anchors, forward and backward."""

    @property
    def total(self) -> float:
        """Of the whole step for one image."""
        return self.target + self.rand + self.focal


def flops_per_image(
    *,
    model: Mapping[str, Any],
    head: Mapping[str, Any],
    num_prototypes: int,
    patch_drop: float,
    rand_views: int,
    focal_views: int,
    rand_size: int,
    focal_size: int,
) -> Flops:
    """Nominal operations that one image costs in a training step.

    A view of N kept patches costs, forward:
    2 N 3 patch_size^2 D (patch embedding) + depth (2 L D^2 (4 + 2 mlp_ratio) + 4 L^2 D) (blocks)
    + 2 (D hidden + hidden^2 + hidden P) (head) + 2 P K (prototypes); an anchor view three times
    that.

    Args:
        model: the six numbers of `VisionTransformer`.
        head: hidden_dim and output_dim of `ProjectionHead`.
        num_prototypes: K.
        patch_drop: share of patches removed from rand anchors, in [0, 1).
        rand_views: R, >= 0.
        focal_views: F, >= 0.
        rand_size: side of target and rand views, px.
        focal_size: side of focal views, px.

    Raises:
        UserError: if no patch would be left.
    """
    large, small = (size // int(model["patch_size"]) for size in (rand_size, focal_size))
    kept = num_kept_patches(large**2, patch_drop)
    shared = _head_flops(model, head, num_prototypes)
    return Flops(
        target=trunk_flops(model, large**2) + shared,
        rand=3 * rand_views * (trunk_flops(model, kept) + shared),
        focal=3 * focal_views * (trunk_flops(model, small**2) + shared),
    )


def trunk_flops(model: Mapping[str, Any], num_patches: int) -> float:
    """Forward operations of the trunk for one view of `num_patches` embedded patches."""
    width, tokens = int(model["embed_dim"]), 1 + num_patches
    embedding = 2 * num_patches * 3 * int(model["patch_size"]) ** 2 * width
    linear = 2 * tokens * width**2 * (4 + 2 * float(model["mlp_ratio"]))
    attention = 4 * tokens**2 * width
    return embedding + int(model["depth"]) * (linear + attention)


def _head_flops(model: Mapping[str, Any], head: Mapping[str, Any], num_prototypes: int) -> float:
    hidden, projection = int(head["hidden_dim"]), int(head["output_dim"])
    layers = int(model["embed_dim"]) * hidden + hidden**2 + hidden * projection
    return 2.0 * (layers + projection * num_prototypes)
