"""Positions of patches: learned or fixed embeddings, or rotations of queries and keys (axial RoPE).

Legend: B images, N patches, M kept patches, D embedding width, d width of a head.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.layers import build_sincos2d_pos_embed
from torch import Tensor

from msn.errors import UserError

ROPE_BASE = 100.0  # of DINOv3 (arXiv 2508.10104, section 3.2)


def resize_position_embeddings(
    pos_embed: Tensor, grid: tuple[int, int], *, antialias: bool = False, offset: float = 0.0
) -> Tensor:
    """Resize square position embeddings [1, N, D] or [1, 1 + N, D] to a grid, bicubic.

    Args:
        pos_embed: of a square number of patches, with or without that of the class token first.
        grid: rows and columns of patches.
        antialias: as DINOv2 with registers and timm do; the paper's code does not.
        offset: added to rows and columns in the scale factor; DINOv2 without registers has 0.1.

    Returns:
        [1, (1 +) rows * columns, D], the class token's embedding untouched.
    """
    side = math.isqrt(pos_embed.shape[1])
    first = pos_embed.shape[1] - side**2  # 1 where the class token has one
    image = pos_embed[:, first:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    if torch.are_deterministic_algorithms_enabled() and not offset and not image.is_cpu:
        resized = resize_by_products(image, grid, antialias)
    elif offset:
        scale = [(length + offset) / side for length in grid]
        resized = F.interpolate(image, scale_factor=scale, mode="bicubic", antialias=antialias)
    else:
        resized = F.interpolate(
            image, size=grid, mode="bicubic", align_corners=False, antialias=antialias
        )
    patches = resized.permute(0, 2, 3, 1).flatten(1, 2)
    return torch.cat([pos_embed[:, :first], patches], dim=1) if first else patches


def resize_by_products(image: Tensor, grid: tuple[int, int], antialias: bool) -> Tensor:
    """The same resizing as a product along each axis, [1, D, side, side] -> [1, D, *grid].

    CUDA's bicubic backward is not deterministic, and fails before torch 2.14 if asked to be.
    """
    side = image.shape[-1]
    one = torch.eye(side, dtype=image.dtype)[None, None]  # on the CPU; small enough to travel
    rows, columns = (
        F.interpolate(one, size=(length, side), mode="bicubic", antialias=antialias)[0, 0].to(
            image.device, non_blocking=True
        )
        for length in grid
    )
    with torch.autocast(image.device.type, enabled=False):
        return rows @ image @ columns.T


def sincos_positions(side: int, width: int) -> Tensor:
    """Fixed sine-cosine embeddings of a square of patches (arXiv 2111.06377, appendix A).

    As in MAE's released files, the columns' sines and cosines come before the rows'.

    Returns:
        [side^2, width], float64.
    """
    table = build_sincos2d_pos_embed([side, side], width, dtype=torch.float64)
    sin_row, sin_column, cos_row, cos_column = table.chunk(4, dim=1)
    return torch.cat([sin_column, cos_column, sin_row, cos_row], dim=1)


@dataclass(frozen=True)
class Rope:
    """Axial rotary positions of DINOv3: row and column rotate pairs of a query's or key's numbers.

    Raises:
        UserError: if a number is out of its range.
    """

    width: int  # d, a multiple of 4
    base: float = ROPE_BASE  # periods are base^(4 i / d) of the image's half side, i < d / 4
    # For training; None is off.
    shift: float | None = None  # greatest shift of coordinates; the image's half side is 1
    jitter: float | None = None  # each axis is scaled by [1 / jitter, jitter], log-uniform
    rescale: float | None = None  # likewise both axes together; DINOv3 takes 2

    def __post_init__(self) -> None:
        if self.width % 4:
            raise UserError(
                "model.position=rope: model.embed_dim / model.num_heads must be a multiple of 4, "
                f"got {self.width}"
            )
        if not self.base > 1:
            raise UserError(f"model.rope_base must be > 1, got {self.base}")
        if self.shift is not None and self.shift < 0:
            raise UserError(f"model.rope_shift must be >= 0 or null, got {self.shift}")
        for name in ("jitter", "rescale"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"model.rope_{name} must be >= 1 or null, got {value}")

    def draw(self, generator: torch.Generator) -> Tensor | None:
        """Draw shift and scale of the rows' and the columns' coordinates for one step.

        Returns:
            [2, 2], shifts first; None if all three settings are off.
        """
        if self.shift is None and self.jitter is None and self.rescale is None:
            return None
        moved = (2 * torch.rand(2, generator=generator) - 1) * (self.shift or 0.0)
        axes = (2 * torch.rand(2, generator=generator) - 1) * math.log(self.jitter or 1.0)
        both = (2 * torch.rand(1, generator=generator) - 1) * math.log(self.rescale or 1.0)
        return torch.stack([moved, (axes + both).exp()])

    def rotations(
        self, grid: tuple[int, int], kept: Tensor | None, moved: Tensor | None, like: Tensor
    ) -> Tensor:
        """Sines and cosines of the rotations of a grid's patches.

        Args:
            grid: rows and columns of patches.
            kept: indices of the kept patches, [M] or [..., M]; None for all.
            moved: see `draw`.
            like: gives device and, if wider than float32, the type.

        Returns:
            [N or M, 2 d], or [B, M, 2 d] if each image keeps its own patches; sines first.
        """
        wide, device = torch.promote_types(like.dtype, torch.float32), like.device
        numbers = [torch.arange(length, device=device, dtype=wide) for length in grid]
        centres = [(number + 0.5) / len(number) * 2 - 1 for number in numbers]
        places = torch.stack(torch.meshgrid(*centres, indexing="ij"), dim=-1).flatten(0, 1)
        if moved is not None:
            shift, stretch = moved.to(places)
            places = (places + shift) * stretch
        count = self.width // 4
        exponents = torch.arange(count, device=device, dtype=wide) / count
        angles = 2 * math.pi * places[:, :, None] / self.base**exponents  # [N, 2, d / 4]
        angles = angles.flatten(1).repeat(1, 2)
        turns = torch.cat([angles.sin(), angles.cos()], dim=-1)
        return turns if kept is None else turns[kept if kept.ndim == 1 else kept.flatten(0, -2)]


def rotate(heads: Tensor, turns: Tensor) -> Tensor:
    """Rotate the queries or keys of patches; class token and registers, which come first, stay.

    Args:
        heads: [B, heads, L, d].
        turns: of the last tokens, see `Rope.rotations`.

    Returns:
        [B, heads, L, d] of the same type; products are taken in that of `turns`.
    """
    first = heads.shape[-2] - turns.shape[-2]
    patches = heads[..., first:, :]
    sines, cosines = turns.unsqueeze(-3).chunk(2, dim=-1)
    left, right = patches.chunk(2, dim=-1)
    turned = patches * cosines + torch.cat([-right, left], dim=-1) * sines
    return torch.cat([heads[..., :first, :], turned.to(heads.dtype)], dim=-2)
