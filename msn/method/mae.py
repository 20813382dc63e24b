"""Masked autoencoders (arXiv 2111.06377): a decoder predicts the patches that a trunk never saw.

Legend: B images, N patches, M kept patches, D width of the trunk, E width of the decoder,
p patch side in px. Section numbers are those of that paper.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from msn.errors import UserError
from msn.method.block import Block
from msn.method.network import Network
from msn.method.positions import sincos_positions
from msn.method.vit import VisionTransformer
from msn.schema import whole_number


class Reconstruction(NamedTuple):
    """Outputs of one pass."""

    loss: Tensor  # mean squared error over masked patches, scalar
    prediction: Tensor  # pixels in the order row, column, channel, [B, N, p * p * 3]
    mask: Tensor  # 1 where a patch was masked, 0 where it was kept, [B, N]


class Errors(NamedTuple):
    """Outputs of a training pass, all in at least float32, patches in order."""

    loss: Tensor  # mean squared error over masked patches, scalar
    patches: Tensor  # mean squared error of each patch, [B, N]
    of_means: Tensor  # the same if each patch's mean were predicted for all its pixels, [B, N]
    mask: Tensor  # 1 where a patch was masked, 0 where it was kept, [B, N]
    class_tokens: Tensor  # of the trunk after the last norm, [B, D]


class MAE(Network):
    """Trunk and decoder (section 3); after pretraining the decoder is thrown away.

    Args:
        model: arguments of `VisionTransformer`; positions are fixed sine-cosine here.
        decoder: `embed_dim` E (a multiple of 4 that `num_heads` divides), `depth`, `num_heads`.
        mask_ratio: share of patches that are masked, in (0, 1); N (1 - mask_ratio) are kept.
        norm_pix_loss: predict patches normalised by their mean and standard deviation.

    Raises:
        UserError: if a number is out of its range, or the ratio keeps or masks no patch.
    """

    def __init__(
        self,
        *,
        model: Mapping[str, int | float],
        decoder: Mapping[str, int],
        mask_ratio: float,
        norm_pix_loss: bool,
    ) -> None:
        super().__init__()
        # The numbers of a configuration; `VisionTransformer` checks which must be whole.
        self.trunk = VisionTransformer(**model)  # type: ignore[arg-type]
        places = self.trunk.pos_embed
        if places is None or not self.trunk.class_position:
            raise UserError(
                "MAE's positions are fixed: leave out model.position, registers, class_position"
            )
        if self.trunk.embed_dim % 4:
            raise UserError(
                "model.embed_dim must be a multiple of 4 for MAE's fixed positions, got "
                f"{self.trunk.embed_dim}"
            )
        side = self.trunk.img_size // self.trunk.patch_size
        self.num_kept = num_unmasked_patches(side**2, mask_ratio)
        self.norm_pix_loss = norm_pix_loss
        self.decoder = Decoder(self.trunk, **decoder)
        _set_positions(places, side)
        self.apply(_init_linear)
        nn.init.xavier_uniform_(self.trunk.patch_embed.proj.weight.view(self.trunk.embed_dim, -1))
        nn.init.normal_(self.trunk.cls_token, std=0.02)

    @property
    def backbone(self) -> VisionTransformer:
        """The trunk."""
        return self.trunk

    @property
    def learner(self) -> nn.Module:
        """Trunk and decoder."""
        return self

    @property
    def stacks(self) -> list[nn.ModuleList]:
        """Blocks of trunk and decoder."""
        return [self.trunk.blocks, self.decoder.blocks]

    def forward(self, images: Tensor, noise: Tensor) -> Reconstruction:
        """Reconstruct the patches whose noise is greatest.

        Args:
            images: [B, 3, H, W], normalised, of the trunk's size.
            noise: any numbers, [B, N]; per image the `num_kept` patches with the least noise stay.

        Raises:
            UserError: if images are of another size than the trunk's.
        """
        kept, mask = self._choose(images, noise)
        prediction = self.decoder(self.encode(images, kept), kept)
        return Reconstruction(self.loss(images, prediction, mask), prediction, mask)

    def learn(self, images: Tensor, noise: Tensor, chunk_size: int | None = None) -> Errors:
        """The same pass, giving the errors of all patches instead of their pixels.

        Args:
            images: as of `forward`.
            noise: as of `forward`.
            chunk_size: images per pass under activation checkpointing; images are independent, so
                chunks change memory, not numbers. None takes all at once.

        Raises:
            UserError: if images are of another size than the trunk's.
        """
        kept, mask = self._choose(images, noise)
        run: Callable[..., tuple[Tensor, Tensor, Tensor]] = self._errors
        if chunk_size is not None and torch.is_grad_enabled():  # nothing in it is random
            run = partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
        size = len(images) if chunk_size is None else chunk_size
        parts = [run(*part) for part in zip(images.split(size), kept.split(size), strict=True)]
        patches, of_means, class_tokens = (torch.cat(part) for part in zip(*parts, strict=True))
        loss = (patches * mask).sum() / mask.sum()
        return Errors(loss, patches, of_means, mask, class_tokens)

    def _errors(self, images: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tokens = self.encode(images, kept)
        errors, of_means = self._compare(images, self.decoder(tokens, kept))
        return errors, of_means, tokens[:, 0].detach()

    def _choose(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Patches that are kept, [B, M], and the mask, [B, N]."""
        side = self.trunk.img_size
        if images.shape[-2:] != (side, side):
            raise UserError(f"images must be {side} x {side} px, got {tuple(images.shape[-2:])}")
        # Stable, so that equal numbers fall alike on every device.
        kept = noise.argsort(dim=1, stable=True)[:, : self.num_kept]
        return kept, torch.ones_like(noise).scatter_(1, kept, 0)

    def encode(self, images: Tensor, kept: Tensor | None) -> Tensor:
        """Class token and kept patches after the last norm, [B, 1 + M, D]; None keeps all."""
        tokens = self.trunk.embed(images, kept)
        return self.trunk.norm(_through(self.trunk.blocks, tokens))

    def loss(self, images: Tensor, prediction: Tensor, mask: Tensor) -> Tensor:
        """Squared error per patch, averaged over the masked patches of the batch, in float32."""
        errors, _ = self._compare(images, prediction)
        return (errors * mask).sum() / mask.sum()

    def _compare(self, images: Tensor, prediction: Tensor) -> tuple[Tensor, Tensor]:
        """Errors of the prediction and of each patch's mean, both [B, N]."""
        wide = torch.promote_types(prediction.dtype, torch.float32)
        wanted = patchify(images, self.trunk.patch_size).to(wide)
        variance, mean = torch.var_mean(wanted, dim=-1, keepdim=True)
        of_means = variance * ((wanted.shape[-1] - 1) / wanted.shape[-1])
        if self.norm_pix_loss:
            wanted = (wanted - mean) / (variance + 1e-6).sqrt()
            of_means = of_means / (variance + 1e-6)
        return (prediction.to(wide) - wanted).square().mean(dim=-1), of_means[..., 0]


class Decoder(nn.Module):
    """A small transformer over kept patches and mask tokens, each at its place (section 3).

    Args:
        trunk: gives the tokens.
        embed_dim: E, a multiple of 4.
        depth: blocks, >= 1.
        num_heads: attention heads; divides E.

    Raises:
        UserError: if a number is out of its range.
    """

    def __init__(
        self, trunk: VisionTransformer, *, embed_dim: int, depth: int, num_heads: int
    ) -> None:
        super().__init__()
        for name, value in {"embed_dim": embed_dim, "depth": depth, "num_heads": num_heads}.items():
            whole_number(f"decoder.{name}", value, 1)
        if embed_dim % 4 or embed_dim % num_heads:
            raise UserError(
                f"decoder.embed_dim must be a multiple of 4 and of num_heads={num_heads}, "
                f"got {embed_dim}"
            )
        side = trunk.img_size // trunk.patch_size
        norm = partial(nn.LayerNorm, eps=trunk.norm.eps)
        self.embed = nn.Linear(trunk.embed_dim, embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + side**2, embed_dim))
        # timm declares a class; any function from a width to a norm works.
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, 4.0, qkv_bias=True, norm_layer=norm)  # type: ignore[arg-type]
            for _ in range(depth)
        )
        self.norm = norm(embed_dim)
        self.pred = nn.Linear(embed_dim, trunk.patch_size**2 * 3)
        _set_positions(self.pos_embed, side)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, tokens: Tensor, kept: Tensor) -> Tensor:
        """Predict the pixels of all patches.

        Args:
            tokens: class token and kept patches, [B, 1 + M, D].
            kept: indices of those patches, [B, M].

        Returns:
            [B, N, p * p * 3].
        """
        tokens = self.embed(tokens)
        patches = self.pos_embed.shape[1] - 1
        places = kept.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])
        full = self.mask_token.to(tokens.dtype).repeat(len(tokens), patches, 1)
        full = full.scatter(1, places, tokens[:, 1:])
        tokens = torch.cat([tokens[:, :1], full], dim=1) + self.pos_embed
        return self.pred(self.norm(_through(self.blocks, tokens)))[:, 1:]


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Pixels of each patch in the order row, column, channel, [B, 3, H, W] -> [B, N, p * p * 3]."""
    rows = images.unflatten(-2, (-1, patch_size)).unflatten(-1, (-1, patch_size))
    return rows.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, patch_size: int) -> Tensor:
    """The inverse of `patchify` for square images, [B, N, p * p * 3] -> [B, 3, H, W]."""
    side = round(patches.shape[1] ** 0.5)
    pixels = patches.unflatten(-1, (patch_size, patch_size, 3)).unflatten(1, (side, side))
    return pixels.permute(0, 5, 1, 3, 2, 4).flatten(-2).flatten(-3, -2)


def _through(blocks: nn.ModuleList, tokens: Tensor) -> Tensor:
    groups = ((tokens.shape[0], tokens.shape[1]),)
    packed = tokens.flatten(0, 1)
    for block in blocks:
        packed = block(packed, groups)
    return packed.view_as(tokens)


def _set_positions(positions: nn.Parameter, side: int) -> None:
    """Fixed sine-cosine positions (appendix A), the class token's zero; they are not trained."""
    with torch.no_grad():
        positions[0, 0] = 0
        positions[0, 1:] = sincos_positions(side, positions.shape[-1])
    positions.requires_grad_(False)


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


def num_unmasked_patches(patches: int, mask_ratio: float) -> int:
    """Patches that the trunk sees of N: N (1 - mask_ratio), rounded down.

    Raises:
        UserError: if the ratio is not in (0, 1), or keeps no patch.
    """
    if not 0 < mask_ratio < 1:
        raise UserError(f"mask_ratio must be in (0, 1), got {mask_ratio}")
    kept = int(patches * (1 - mask_ratio))
    if kept < 1:
        raise UserError(f"mask_ratio {mask_ratio} keeps none of {patches} patches")
    return kept
