"""Which patches a masked anchor keeps (paper section 3, random masking)."""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from msn.errors import UserError
from msn.schema import Range, check_ranges

SCOPES = ("batch", "image")


@dataclass(frozen=True, kw_only=True)
class PatchDrop:
    """Random masking as a pure function of (seed, step), so that a resumed run drops the same.

    Raises:
        UserError: if a setting is out of its range.
    """

    # Share of patches removed from rand anchors.
    patch_drop: Annotated[float, Range(0, 1, below_high=True)]
    # "batch" draws one mask per step for all images of all processes (as the released code does on
    # one GPU), "image" one per image and rand view.
    patch_drop_scope: str

    def __post_init__(self) -> None:
        check_ranges("method", self)
        if self.patch_drop_scope not in SCOPES:
            allowed = ", ".join(SCOPES)
            raise UserError(
                f"method.patch_drop_scope={self.patch_drop_scope}: must be one of {allowed}"
            )

    def draw(
        self, num_patches: int, *, rand_views: int, images: range, global_batch_size: int, key: int
    ) -> Tensor | None:
        """Indices of the patches to keep in one step.

        Args:
            num_patches: N, patches of a rand view.
            rand_views: R, rand views per image.
            images: positions of this process's images in the global batch.
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
        if self.patch_drop_scope == "batch":
            return torch.randperm(num_patches, generator=generator)[:kept]
        # Drawn for the global batch, so that the masks do not depend on the number of processes.
        noise = torch.rand(rand_views, global_batch_size, num_patches, generator=generator)
        return noise[:, images.start : images.stop].argsort(dim=-1)[..., :kept]


def draw_key(seed: int, step: int) -> int:
    """The `key` of `PatchDrop.draw` in a step; any injective mix would do."""
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
