"""Which patches a masked anchor keeps (paper section 3, random masking)."""

import torch
from torch import Tensor

from msn.errors import UserError

SCOPES = ("batch", "image")


class PatchDrop:
    """Random masking as a pure function of (seed, step): a resumed run drops what it would have.

    Args:
        patch_drop: share of patches removed from rand anchors, in [0, 1).
        patch_drop_scope: "batch" draws one mask per step for all images of all processes (the
            released code's behaviour on one GPU), "image" one for each image and rand view.

    Raises:
        UserError: if a setting is out of its range.
    """

    def __init__(self, *, patch_drop: float, patch_drop_scope: str) -> None:
        if not 0 <= patch_drop < 1:
            raise UserError(f"method.patch_drop must be in [0, 1), got {patch_drop}")
        if patch_drop_scope not in SCOPES:
            raise UserError(
                f"method.patch_drop_scope={patch_drop_scope}: must be one of {', '.join(SCOPES)}"
            )
        self.patch_drop, self.scope = patch_drop, patch_drop_scope

    def draw(
        self, num_patches: int, *, rand_views: int, images: range, global_batch_size: int, key: int
    ) -> Tensor | None:
        """Indices of the patches to keep in one step.

        Args:
            num_patches: N of a rand view.
            rand_views: R.
            images: places of this process's images in the global batch.
            global_batch_size: images of all processes.
            key: seed of this step's draw, the same on all processes.

        Returns:
            Distinct 0-based indices in random order, [M] for scope "batch", [R, B, M] for "image";
            None if nothing is dropped.

        Raises:
            UserError: if no patch would be left.
        """
        kept = num_kept_patches(num_patches, self.patch_drop)
        if kept == num_patches:
            return None
        generator = torch.Generator().manual_seed(key)
        if self.scope == "batch":
            return torch.randperm(num_patches, generator=generator)[:kept]
        # Drawn for the global batch, so that the masks do not depend on the number of processes.
        noise = torch.rand(rand_views, global_batch_size, num_patches, generator=generator)
        return noise[:, images.start : images.stop].argsort(dim=-1)[..., :kept]


def draw_key(seed: int, step: int) -> int:
    """The `key` of a step's draw in a run."""
    # Any injective mix will do: the generator scrambles its seed.
    return (seed << 32) + step


def num_kept_patches(num_patches: int, patch_drop: float) -> int:
    """Patches that a masked anchor keeps: floor(N (1 - patch_drop)), e.g. 166 of 196 at 0.15.

    Raises:
        UserError: if none would be left.
    """
    kept = int(num_patches * (1 - patch_drop))
    if kept < 1:
        raise UserError(f"method.patch_drop {patch_drop} leaves none of {num_patches} patches")
    return kept
