"""The vision transformer: timm's blocks and names, explicit patch drop, views of several sizes.

Legend: B images, N patches, L = 1 + N tokens of one image (class token first), D embedding width,
d width of a head, T tokens of all views together.

Views of different sizes are packed into one [T, D] matrix, so that norms, projections and MLPs run
once per block over everything; only attention is taken per view size. Parameter names are those of
`timm.create_model("vit_...", num_classes=0)`.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Attention
from timm.models.vision_transformer import Block as TimmBlock
from torch import Tensor, nn

from msn.errors import UserError

# (number of images, tokens per image) of each view size in a packed [T, D] matrix.
Groups = Sequence[tuple[int, int]]


class Block(TimmBlock):
    """timm's pre-norm block, applied to packed tokens [T, D] with attention inside each image."""

    attn: Attention

    # timm's block takes tokens alone.
    def forward(  # type: ignore[override]
        self, tokens: Tensor, groups: Groups, class_only: bool = False
    ) -> Tensor:
        """Attend and transform every token, [T, D] -> [T, D], or see `class_tokens`.

        Both ways lead through here, because compiling a module in place compiles its `forward`.
        """
        if class_only:
            return self.class_tokens(tokens, groups)
        tokens = tokens + self._attend(self.norm1(tokens), groups)
        return tokens + self.mlp(self.norm2(tokens))

    def class_tokens(self, tokens: Tensor, groups: Groups) -> Tensor:
        """The same block where only class tokens are wanted: exact, without the others' work.

        With one query per image, scores are (q W_k) x and the result W_v (weights x): keys and
        values of the tokens are never made.

        Returns:
            Class tokens of all images, [sum of B, D].
        """
        normed = self.norm1(tokens)
        mixed, classes = [], []
        sizes = [batch * length for batch, length in groups]
        parts = zip(groups, tokens.split(sizes), normed.split(sizes), strict=True)
        for (batch, length), rows, normed_rows in parts:
            mixed.append(self._attend_from_class(normed_rows.view(batch, length, -1)))
            classes.append(rows.view(batch, length, -1)[:, 0])
        out = torch.cat(classes) + self.attn.proj(torch.cat(mixed))
        return out + self.mlp(self.norm2(out))

    def _attend_from_class(self, normed: Tensor) -> Tensor:
        """Attention with the class token as the only query, [B, L, D] -> [B, D]."""
        heads, width = self.attn.num_heads, normed.shape[-1]
        # [D, D] and [D] each, of queries, keys and values. The keys' bias adds the same to all
        # scores of a query, so it is without effect.
        query_weight, key_weight, value_weight = self.attn.qkv.weight.chunk(3)
        query_bias, _, value_bias = self.attn.qkv.bias.chunk(3)
        queries = F.linear(normed[:, 0], query_weight, query_bias) * (width // heads) ** -0.5
        queries = queries.view(-1, heads, width // heads).transpose(0, 1)  # [heads, B, d]
        seeing = queries @ key_weight.view(heads, -1, width)  # [heads, B, D]
        # Scores are not rounded to the autocast type, as fused attention does not round its own.
        with _no_autocast(normed.device.type):
            wide = torch.promote_types(normed.dtype, torch.float32)
            scores = seeing.transpose(0, 1).to(wide) @ normed.transpose(1, 2).to(wide)
        mixed = scores.softmax(dim=-1).to(normed.dtype) @ normed  # [B, heads, D]
        out = mixed.transpose(0, 1) @ value_weight.view(heads, -1, width).transpose(1, 2)
        return out.transpose(0, 1).flatten(1) + value_bias

    def _attend(self, tokens: Tensor, groups: Groups) -> Tensor:
        packed = self.attn.qkv(tokens).split([batch * length for batch, length in groups])
        attended = []
        for (batch, length), qkv in zip(groups, packed, strict=True):
            # [B*L, 3D] -> three times [B, heads, L, d]
            by_head = qkv.view(batch, length, 3, self.attn.num_heads, -1).permute(2, 0, 3, 1, 4)
            out = F.scaled_dot_product_attention(*by_head)
            attended.append(out.transpose(1, 2).reshape(batch * length, -1))
        return self.attn.proj(torch.cat(attended))


def _no_autocast(device_type: str) -> AbstractContextManager[object]:
    """The meta device has no autocast to switch off."""
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


LAYER_NORM_EPS = 1e-6
MOST_BLOCKS = 1000  # twenty times the deepest that people train; a mistyped number ends in a line


class VisionTransformer(nn.Module):
    """The trunk of anchor and target (paper section 3), pre-norm, learned position embeddings.

    Args:
        img_size: native image side in pixels; `patch_size` divides it.
        patch_size: patch side in pixels.
        embed_dim: embedding width D; `num_heads` divides it.
        depth: number of blocks, >= 1.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP over D, > 0.
        layer_norm_eps: added to variances; other libraries' weights may need another than ours.

    Raises:
        UserError: if a number is out of its range.
    """

    def __init__(
        self,
        *,
        img_size: int,
        patch_size: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        layer_norm_eps: float = LAYER_NORM_EPS,
    ) -> None:
        super().__init__()
        _check_sizes(img_size, patch_size, embed_dim, depth, num_heads, mlp_ratio)
        self.model_config: dict[str, int | float] = {
            "img_size": img_size,
            "patch_size": patch_size,
            "embed_dim": embed_dim,
            "depth": depth,
            "num_heads": num_heads,
            "mlp_ratio": mlp_ratio,
        }
        if layer_norm_eps != LAYER_NORM_EPS:
            self.model_config["layer_norm_eps"] = layer_norm_eps
        self.img_size, self.patch_size = img_size, patch_size
        self.embed_dim, self.depth = embed_dim, depth
        self.num_heads, self.mlp_ratio = num_heads, mlp_ratio
        self.patch_embed = PatchEmbed(img_size, patch_size, 3, embed_dim, bias=True)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + (img_size // patch_size) ** 2, embed_dim))
        norm = partial(nn.LayerNorm, eps=layer_norm_eps)
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, qkv_bias=True, norm_layer=norm)  # type: ignore[arg-type]
            for _ in range(depth)
        )
        self.norm = norm(embed_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the reference's initialisation, which differs from timm's in token and patch layer.

        Linear weights, class token and position embeddings: truncated normal of std 0.02; patch
        convolution: Kaiming normal over fan-in with ReLU gain; LayerNorm 1 and 0; biases 0.
        """
        self.apply(init_linear)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.kaiming_normal_(self.patch_embed.proj.weight, mode="fan_in", nonlinearity="relu")
        assert self.patch_embed.proj.bias is not None
        nn.init.zeros_(self.patch_embed.proj.bias)

    def forward(self, views: Sequence[Tensor], kept: Sequence[Tensor | None]) -> list[Tensor]:
        """Class tokens of views of several sizes in one pass, after the final norm.

        Args:
            views: one tensor per view size, each [..., 3, h, w] with its own leading axes.
            kept: for each of `views` the 0-based indices of the patches to keep, [M] for all
                images or [..., M] for each; None keeps all.

        Returns:
            For each of `views` its class tokens, [..., D].

        Raises:
            UserError: if the patch does not divide a view's size.
        """
        embedded = [self.embed(view, keep) for view, keep in zip(views, kept, strict=True)]
        groups = tuple((tokens.shape[0], tokens.shape[1]) for tokens in embedded)
        packed = torch.cat([tokens.flatten(0, 1) for tokens in embedded])  # [T, D]
        *full_blocks, last_block = self.blocks
        for block in full_blocks:
            packed = block(packed, groups)
        classes = self.norm(last_block(packed, groups, class_only=True))
        parts = classes.split([batch for batch, _ in groups])
        return [part.unflatten(0, view.shape[:-3]) for part, view in zip(parts, views, strict=True)]

    def embed(self, images: Tensor, kept: Tensor | None) -> Tensor:
        """Patches to tokens; dropped patches are never embedded.

        Args:
            images: [..., 3, h, w]; leading axes are joined.
            kept: [M], [..., M] or None, see `forward`.

        Returns:
            Tokens with the class token first, [B, 1 + M, D].
        """
        size = self.patch_size
        grid = self._grid(images.shape[-2], images.shape[-1])
        pixels = images.reshape(-1, 3, grid[0], size, grid[1], size)
        patches = pixels.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # [B, N, 3*size*size]
        positions = self.position_embeddings(grid)
        patch_positions = positions[:, 1:]
        if kept is not None:
            patches = _keep(patches, kept)
            patch_positions = _keep(patch_positions, kept)
        tokens = F.linear(
            patches, self.patch_embed.proj.weight.flatten(1), self.patch_embed.proj.bias
        )
        classes = (self.cls_token + positions[:, :1]).expand(tokens.shape[0], -1, -1)
        return torch.cat([classes.to(tokens.dtype), tokens + patch_positions], dim=1)

    def position_embeddings(self, grid: tuple[int, int]) -> Tensor:
        """Position embeddings for a grid of patches, [1, 1 + rows * columns, D].

        Other grids than the native one are resized bicubically *without* antialias, as the paper's
        code and Hugging Face do; timm antialiases.
        """
        side = self.img_size // self.patch_size
        if grid == (side, side):
            return self.pos_embed
        return resize_position_embeddings(self.pos_embed, grid)

    def forward_features(self, images: Tensor, *, norm: bool) -> Tensor:
        """All tokens of the last block, [B, 3, h, w] -> [B, 1 + N, D]; `norm`: the final one too.

        Low-shot evaluation reads the class token *before* the final norm (paper A.2).
        """
        tokens = self.forward_intermediates(images, 1)[0]
        return self.norm(tokens) if norm else tokens

    def forward_intermediates(self, images: Tensor, last: int) -> list[Tensor]:
        """Outputs of the `last` blocks before the final norm, oldest first, each [B, 1 + N, D]."""
        if not 1 <= last <= self.depth:
            raise UserError(f"last must be in [1, {self.depth}] (blocks of this model), got {last}")
        tokens = self.embed(images, None)
        groups = ((tokens.shape[0], tokens.shape[1]),)
        packed, outputs = tokens.flatten(0, 1), []
        for index, block in enumerate(self.blocks):
            # Not `block(...)`: compiled for training, it would compile anew for each batch size.
            packed = block.forward(packed, groups)
            if index >= self.depth - last:
                outputs.append(packed.view_as(tokens))
        return outputs

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        if height % self.patch_size or width % self.patch_size:
            raise UserError(
                f"image size {height} x {width} is not divisible by patch_size {self.patch_size}"
            )
        return height // self.patch_size, width // self.patch_size


def init_linear(module: nn.Module) -> None:
    """Truncated normal weights of std 0.02 and zero biases for a Linear layer, else nothing."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def resize_position_embeddings(pos_embed: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resize square position embeddings [1, 1 + side^2, D] to a grid, bicubic, no antialias.

    Returns:
        [1, 1 + rows * columns, D], the class token's embedding untouched.
    """
    side = math.isqrt(pos_embed.shape[1] - 1)
    image = pos_embed[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    resized = F.interpolate(image, size=grid, mode="bicubic", align_corners=False, antialias=False)
    return torch.cat([pos_embed[:, :1], resized.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def _keep(tokens: Tensor, kept: Tensor) -> Tensor:
    """Select tokens [B or 1, N, D] by [M] or [..., M]; leading axes of `kept` are joined."""
    if kept.ndim == 1:
        return tokens[:, kept]
    index = kept.flatten(0, -2).unsqueeze(-1).expand(-1, -1, tokens.shape[-1])
    return tokens.expand(index.shape[0], -1, -1).gather(1, index)


def _check_sizes(
    img_size: int, patch_size: int, embed_dim: int, depth: int, num_heads: int, mlp_ratio: float
) -> None:
    sizes = {
        "img_size": img_size,
        "patch_size": patch_size,
        "embed_dim": embed_dim,
        "depth": depth,
        "num_heads": num_heads,
    }
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"model.{name} must be a whole number >= 1, got {value!r}")
    if depth > MOST_BLOCKS:
        raise UserError(f"model.depth must be at most {MOST_BLOCKS:,} blocks, got {depth:,}")
    if not isinstance(mlp_ratio, int | float) or mlp_ratio <= 0:
        raise UserError(f"model.mlp_ratio must be > 0, got {mlp_ratio!r}")
    if img_size % patch_size:
        raise UserError(
            f"model.img_size {img_size} is not divisible by model.patch_size {patch_size}"
        )
    if embed_dim % num_heads:
        raise UserError(
            f"model.embed_dim {embed_dim} is not divisible by model.num_heads {num_heads}"
        )
