"""The vision transformer: timm's blocks, explicit patch drop, views of several sizes.

Legend: B images, N patches, R registers, L = 1 + R + N tokens of one image (class token first, then
registers), D embedding width, d width of a head, T tokens of all views together.

Views of different sizes are packed into one [T, D] matrix, so that norms, projections and MLPs run
once per block; only attention runs per view size. The options give DINOv2's (arXiv 2304.07193) or
DINOv3's trunk (arXiv 2508.10104). Parameter names are those of timm's model of the family:
`vit_..._dinov3` with rotary positions, else `vit_...`.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed, SwiGLUPacked
from torch import Tensor, nn

from msn.errors import UserError
from msn.method.block import Block, RotaryBlock, Turns
from msn.method.positions import ROPE_BASE, Rope, resize_position_embeddings, sincos_positions
from msn.schema import whole_number

LAYER_NORM_EPS = 1e-6
SIZES = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")
# The options, in the order of `VisionTransformer`'s arguments, as a plain ViT has them.
PLAIN: dict[str, Any] = {
    "layer_norm_eps": LAYER_NORM_EPS,
    "registers": 0,
    "layer_scale": None,
    "mlp": "gelu",
    "position": "learned",
    "class_position": True,
    "qkv_bias": True,
    "rope_base": ROPE_BASE,
    "rope_shift": None,
    "rope_jitter": None,
    "rope_rescale": None,
}
MLPS, POSITIONS = ("gelu", "swiglu"), ("learned", "sincos", "rope")
MOST_BLOCKS = 1000  # guards against mistyped numbers


class VisionTransformer(nn.Module):
    """The trunk of anchor and target (paper section 3): pre-norm, by default a plain ViT.

    Args:
        img_size: native image side in pixels; `patch_size` divides it.
        patch_size: patch side in pixels.
        embed_dim: embedding width D; `num_heads` divides it.
        depth: number of blocks, >= 1.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP over D, > 0; of SwiGLU that of the gated layer.
        layer_norm_eps: added to variances; other libraries' weights may need another value.
        registers: R further tokens that belong to no patch, >= 0.
        layer_scale: initial factor of each branch, > 0; None for no factors.
        mlp: "gelu" or "swiglu".
        position: "learned", "sincos" (fixed) or "rope" (rotary, see `Rope`).
        class_position: whether the class token has a position embedding.
        qkv_bias: whether queries, keys and values have biases; with "rope" keys never do.
        rope_base: see `Rope.base`.
        rope_shift: see `Rope.shift`.
        rope_jitter: see `Rope.jitter`.
        rope_rescale: see `Rope.rescale`.

    Attributes:
        model_config: these arguments, without options that are a plain ViT's.
        num_prefix_tokens: 1 + R, the tokens before the patches.
        half_stream: whether under autocast `forward` keeps the residual stream too in its type;
            else the stream is as wide as the parameters.

    Raises:
        UserError: if a number is out of its range, or an option would have no effect.
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
        registers: int = 0,
        layer_scale: float | None = None,
        mlp: str = "gelu",
        position: str = "learned",
        class_position: bool = True,
        qkv_bias: bool = True,
        rope_base: float = ROPE_BASE,
        rope_shift: float | None = None,
        rope_jitter: float | None = None,
        rope_rescale: float | None = None,
    ) -> None:
        super().__init__()
        sizes = (img_size, patch_size, embed_dim, depth, num_heads, mlp_ratio)
        options = (layer_norm_eps, registers, layer_scale, mlp, position, class_position, qkv_bias)
        rope = (rope_base, rope_shift, rope_jitter, rope_rescale)
        chosen = dict(zip(PLAIN, (*options, *rope), strict=True))
        self.model_config: dict[str, Any] = dict(zip(SIZES, sizes, strict=True))
        _check_sizes(self.model_config)
        self.model_config |= {name: v for name, v in chosen.items() if v != PLAIN[name]}
        _check_options(chosen, self.model_config, embed_dim)
        self.img_size, self.patch_size = img_size, patch_size
        self.embed_dim, self.depth = embed_dim, depth
        self.num_heads, self.mlp_ratio = num_heads, mlp_ratio
        self.num_prefix_tokens = 1 + registers
        self.class_position = class_position
        is_rotary = position == "rope"
        self.rope = Rope(embed_dim // num_heads, *rope) if is_rotary else None
        self.half_stream = False
        self._moved: Tensor | None = None  # see `draw_positions`
        self.patch_embed = PatchEmbed(img_size, patch_size, 3, embed_dim, bias=True)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = None
        if not is_rotary:
            places = torch.empty(1, class_position + (img_size // patch_size) ** 2, embed_dim)
            self.pos_embed = nn.Parameter(places, requires_grad=position == "learned")
        self.reg_token = nn.Parameter(torch.empty(1, registers, embed_dim)) if registers else None
        norm = partial(nn.LayerNorm, eps=layer_norm_eps)
        self.blocks = nn.ModuleList(self._block(self.model_config, norm) for _ in range(depth))
        self.norm = norm(embed_dim)
        self.reset_parameters()

    @staticmethod
    def _block(model: Mapping[str, Any], norm: Any) -> Block | RotaryBlock:
        """timm's block of the family."""
        swiglu, width = model.get("mlp") == "swiglu", model["embed_dim"]
        shared: dict[str, Any] = {
            "qkv_bias": model.get("qkv_bias", True),
            "init_values": model.get("layer_scale"),
            "norm_layer": norm,
        }
        if model.get("position") == "rope":
            if swiglu:
                shared |= {"swiglu_mlp": True, "swiglu_align_to": 8}
            return RotaryBlock(width, model["num_heads"], mlp_ratio=model["mlp_ratio"], **shared)
        if not swiglu:
            return Block(width, model["num_heads"], model["mlp_ratio"], **shared)
        # timm counts gate and value, which are one matrix, together.
        both = exact_ratio(2 * int(width * model["mlp_ratio"]), width)
        shared |= {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}
        return Block(width, model["num_heads"], both, **shared)

    def reset_parameters(self) -> None:
        """Initialise as the reference does; timm differs in class token and patch layer.

        Linear weights, class token, registers and learned position embeddings: truncated normal of
        std 0.02; patch convolution: Kaiming normal over fan-in with ReLU gain; LayerNorm 1 and 0;
        biases 0; layer scales as `layer_scale` says.
        """
        self.apply(init_linear)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        if self.pos_embed is not None and self.pos_embed.requires_grad:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        elif self.pos_embed is not None:
            nn.init.zeros_(self.pos_embed)
            side = self.img_size // self.patch_size
            with torch.no_grad():
                self.pos_embed[0, -(side**2) :] = sincos_positions(side, self.embed_dim)
        nn.init.kaiming_normal_(self.patch_embed.proj.weight, mode="fan_in", nonlinearity="relu")
        assert self.patch_embed.proj.bias is not None
        nn.init.zeros_(self.patch_embed.proj.bias)
        if self.reg_token is not None:
            nn.init.trunc_normal_(self.reg_token, std=0.02)

    def forward(self, views: Sequence[Tensor], kept: Sequence[Tensor | None]) -> list[Tensor]:
        """Class tokens of views of several sizes in one pass, after the final norm.

        Args:
            views: one tensor per view size, each [..., 3, h, w] with its own leading axes.
            kept: for each of `views` the 0-based indices of the patches to keep, [M] for all
                images or [..., M] per image; None keeps all.

        Returns:
            For each of `views` its class tokens, [..., D].

        Raises:
            UserError: if the patch does not divide a view's size.
        """
        embedded = [self.embed(view, keep) for view, keep in zip(views, kept, strict=True)]
        groups = tuple((tokens.shape[0], tokens.shape[1]) for tokens in embedded)
        packed = torch.cat([tokens.flatten(0, 1) for tokens in embedded])  # [T, D]
        device = packed.device.type
        if self.half_stream and torch.is_autocast_enabled(device):
            packed = packed.to(torch.get_autocast_dtype(device))
        turns = self.turns(views, kept, self._moved)
        *full_blocks, last_block = self.blocks
        for block in full_blocks:
            packed = block(packed, groups, turns)
        classes = self.norm(last_block(packed, groups, turns, class_only=True))
        parts = classes.split([batch for batch, _ in groups])
        return [part.unflatten(0, view.shape[:-3]) for part, view in zip(parts, views, strict=True)]

    def embed(self, images: Tensor, kept: Tensor | None) -> Tensor:
        """Patches to tokens; dropped patches are never embedded.

        Args:
            images: [..., 3, h, w]; leading axes are joined.
            kept: [M], [..., M] or None, see `forward`.

        Returns:
            Class token, registers, patches, [B, 1 + R + M, D]; rotary positions come later.
        """
        size = self.patch_size
        grid = self._grid(images.shape[-2], images.shape[-1])
        pixels = images.reshape(-1, 3, grid[0], size, grid[1], size)
        patches = pixels.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # [B, N, 3*size*size]
        if kept is not None:
            patches = _keep(patches, kept)
        tokens = F.linear(
            patches, self.patch_embed.proj.weight.flatten(1), self.patch_embed.proj.bias
        )
        first: Tensor = self.cls_token
        if self.pos_embed is None:
            # Under autocast the residual stream stays as wide as the parameters.
            tokens = tokens.to(torch.promote_types(tokens.dtype, first.dtype))
        else:
            positions = self.position_embeddings(grid)
            if self.class_position:
                first, positions = first + positions[:, :1], positions[:, 1:]
            tokens = tokens + (positions if kept is None else _keep(positions, kept))
        parts = [first] if self.reg_token is None else [first, self.reg_token]
        return torch.cat([part.expand(tokens.shape[0], -1, -1) for part in parts] + [tokens], dim=1)

    def position_embeddings(self, grid: tuple[int, int]) -> Tensor:
        """Position embeddings for a grid of patches, [1, (1 +) rows * columns, D].

        Other grids than the native one are resized bicubically: *without* antialias as in the
        paper's code, and in Hugging Face for ViT and DINOv2; with antialias if the class token has
        no position, as in DINOv2 with registers. timm always antialiases.
        """
        assert self.pos_embed is not None
        side = self.img_size // self.patch_size
        if grid == (side, side):
            return self.pos_embed
        return resize_position_embeddings(self.pos_embed, grid, antialias=not self.class_position)

    def draw_positions(self, generator: torch.Generator) -> None:
        """Draw the rotary positions of `forward` until the next draw (`Rope.draw`).

        No effect if that is off. Features are always taken with undisturbed positions.
        """
        moved = None if self.rope is None else self.rope.draw(generator)
        self._moved = None if moved is None else moved.to(self.cls_token.device, non_blocking=True)

    def turns(
        self,
        images: Sequence[Tensor],
        kept: Sequence[Tensor | None],
        moved: Tensor | None = None,
    ) -> Turns:
        """Rotations of each view size (`Rope.rotations`); None without rotary positions.

        Arguments as of `forward`, and the result of `Rope.draw`.
        """
        if self.rope is None:
            return None
        grids = [self._grid(part.shape[-2], part.shape[-1]) for part in images]
        return [
            self.rope.rotations(grid, keep, moved, self.cls_token)
            for grid, keep in zip(grids, kept, strict=True)
        ]

    def forward_features(self, images: Tensor, *, norm: bool) -> Tensor:
        """All tokens of the last block, [B, 3, h, w] -> [B, L, D]; `norm`: the final one too.

        Low-shot evaluation reads the class token *before* the final norm (paper A.2).
        """
        tokens = self.forward_intermediates(images, 1)[0]
        return self.norm(tokens) if norm else tokens

    def forward_intermediates(self, images: Tensor, last: int) -> list[Tensor]:
        """Outputs of the `last` blocks before the final norm, oldest first, each [B, L, D]."""
        if not 1 <= last <= self.depth:
            raise UserError(f"last must be in [1, {self.depth}] (blocks of this model), got {last}")
        tokens = self.embed(images, None)
        groups, turns = ((tokens.shape[0], tokens.shape[1]),), self.turns([images], [None])
        packed, outputs = tokens.flatten(0, 1), []
        for index, block in enumerate(self.blocks):
            # Not `block(...)`, which compiles anew for each batch size if compiled for training.
            packed = block.forward(packed, groups, turns)
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


def _keep(tokens: Tensor, kept: Tensor) -> Tensor:
    """Select tokens [B or 1, N, D] by [M] or [..., M]; leading axes of `kept` are joined."""
    if kept.ndim == 1:
        return tokens[:, kept]
    index = kept.flatten(0, -2).unsqueeze(-1).expand(-1, -1, tokens.shape[-1])
    return tokens.expand(index.shape[0], -1, -1).gather(1, index)


def _check_sizes(model: Mapping[str, Any]) -> None:
    for name in SIZES[:-1]:
        whole_number(f"model.{name}", model[name], 1)
    depth, mlp_ratio = model["depth"], model["mlp_ratio"]
    if depth > MOST_BLOCKS:
        raise UserError(f"model.depth must be at most {MOST_BLOCKS:,} blocks, got {depth:,}")
    if not isinstance(mlp_ratio, int | float) or mlp_ratio <= 0:
        raise UserError(f"model.mlp_ratio must be > 0, got {mlp_ratio!r}")
    for name, divisor in (("img_size", "patch_size"), ("embed_dim", "num_heads")):
        if model[name] % model[divisor]:
            raise UserError(
                f"model.{name} {model[name]} is not divisible by model.{divisor} {model[divisor]}"
            )


def exact_ratio(hidden: int, width: int) -> int | float:
    """The ratio for which timm's `int(width * ratio)` is `hidden`."""
    if hidden % width == 0:
        return hidden // width
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _check_options(options: Mapping[str, Any], changed: Mapping[str, Any], width: int) -> None:
    registers, scale = options["registers"], options["layer_scale"]
    whole_number("model.registers", registers, 0)
    if scale is not None and (not isinstance(scale, int | float) or not scale > 0):
        raise UserError(f"model.layer_scale must be a number > 0 or null, got {scale!r}")
    for name, allowed in (("mlp", MLPS), ("position", POSITIONS)):
        if options[name] not in allowed:
            raise UserError(
                f"model.{name} must be one of {', '.join(allowed)}, got {options[name]!r}"
            )
    if options["position"] == "rope":
        if not options["class_position"]:
            raise UserError("model.class_position=false: model.position=rope gives it none anyway")
        return
    idle = [name for name in changed if name.startswith("rope_")]
    if idle:
        raise UserError(f"model.{idle[0]} is of model.position=rope, not {options['position']}")
    if registers and options["class_position"]:
        raise UserError(
            f"model.registers={registers} with {options['position']} positions needs "
            "model.class_position=false: neither has one, as in DINOv2"
        )
    if options["position"] == "sincos" and width % 4:
        raise UserError(f"model.position=sincos: model.embed_dim {width} must be a multiple of 4")
