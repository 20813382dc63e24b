"""`ForeignBackbone`: a backbone that our trunk does not compute, run by its own library.

It can be measured, not trained or exported. No code from a directory runs, and nothing is fetched:
`tensors.open_weights` reads the weights and hands them to the library as tensors.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms

from msn.errors import UserError, brief
from msn.images.depth import SIXTEEN_BITS
from msn.weights.backbone import Opened, Picture, trimmed
from msn.weights.families import NATIVE, POOLED, Native
from msn.weights.weights import check_tensors, widen

# Integer tensors of other libraries that are not weights.
_COUNTERS = ("_index", "position_ids", "num_batches_tracked")
_TOKENS = ("class_token", "class_token_norm", "patch_mean")


def checked(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The tensors, checked to be floating-point and finite, 16-bit ones as float32.

    Raises:
        UserError: naming those that are not.
    """
    check_tensors({n: t for n, t in tensors.items() if not n.endswith(_COUNTERS)}, where)
    return widen(tensors)


@dataclass(frozen=True)
class Card:
    """What a foreign backbone is, beside its network."""

    where: str
    """Its path, for messages."""
    library: str
    """Name and version."""
    image_size: int
    """Side in px of the transform's output and the network's input."""
    native: Native | None
    """What its family takes as the feature of an image; None if unknown."""
    transform: Callable[[Image.Image], Tensor]
    """The library's own, from an RGB image to [3, S, S]."""
    preprocessing: Mapping[str, Any]
    """What identifies the transform, plain data."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    patch_size: int | None
    """None where tokens are not a grid of equal patches."""
    has_class_token: bool
    meta: Mapping[str, Any]
    """The licence, and what the weights are."""
    model_config: Mapping[str, Any]
    """What identifies the network besides its weights, plain data."""
    build: Callable[[], nn.Module]
    """The same network with new random weights."""


class ForeignBackbone(nn.Module):
    """A frozen backbone of timm or transformers, used as `Backbone` is.

    Args:
        net: the library's network, from images [B, 3, S, S] to [B, D] or [B, D, 1, 1], or to None
            where the library pools nothing.
        norm: name of its final norm in `net`; None if there is none.
        card: what it is.

    Attributes:
        transform: from a path, a PIL image of any mode or a uint8 tensor [3, H, W] to the tensor
            [3, S, S] that the network takes; EXIF rotation is applied.
        embed_dim: width of the native feature, or of the final norm if that is unknown.
    """

    num_heads = depth = None  # the library's business

    def __init__(self, net: nn.Module, norm: str | None, card: Card) -> None:
        super().__init__()
        self.net, self._norm, self.card = net.float().eval(), norm, card
        self.img_size, self.native = card.image_size, card.native
        self.meta, self.model_config = dict(card.meta), dict(card.model_config)
        self.transform: Callable[[Picture], Tensor] = transforms.Compose(
            [Opened(SIXTEEN_BITS), trimmed, card.transform]
        )

    def forward(self, images: Tensor) -> Tensor:
        """The family's own feature, [B, 3, S, S] -> [B, D]."""
        return self.feature(images, NATIVE)

    def resolve(self, kind: str) -> str:
        """The kind of feature that `native` stands for; others are what they are.

        Raises:
            UserError: if the family's feature is unknown.
        """
        if kind != NATIVE:
            return kind
        if self.native is None:
            raise UserError(
                f"{self.card.where}: the feature of this family is not known; choose "
                f"feature={', '.join((POOLED, *_TOKENS))}"
            )
        return self.native.feature

    def feature(self, images: Tensor, kind: str) -> Tensor:
        """One kind of feature, [B, 3, S, S] -> [B, D].

        Args:
            images: normalised.
            kind: `native`, `pooled` (as the library pools for a classifier), `class_token` (before
                the final norm), `class_token_norm`, or `patch_mean` (both after it).

        Raises:
            UserError: if the network has no such feature.
        """
        kind = self.resolve(kind)
        if kind not in (POOLED, *_TOKENS):
            self._lacks(kind, "only our own trunk has it")
        if kind == POOLED:
            rows = self.net(images)
            if rows is None:
                self._lacks(kind, "its library pools nothing")
            return rows.flatten(1)
        return self._of_tokens(images, kind)

    def _of_tokens(self, images: Tensor, kind: str) -> Tensor:
        tokens = self._tokens(images, kind)
        patch = self.card.patch_size
        patches = 0 if patch is None else (images.shape[-2] // patch) * (images.shape[-1] // patch)
        if kind != "patch_mean":
            alone = tokens.ndim == 2  # of CLIP, whose final norm sees nothing else
            if not self.card.has_class_token or not (alone or tokens[0, ..., 0].numel() > patches):
                self._lacks(kind, "it has no class token")
            return tokens if alone else tokens[:, 0]
        if tokens.ndim != 3 or not 0 < patches <= tokens.shape[1]:
            self._lacks(kind, "its final norm sees no patches")
        return tokens[:, tokens.shape[1] - patches :].mean(dim=1)

    def _tokens(self, images: Tensor, kind: str) -> Tensor:
        """Input (`class_token`) or output of the final norm, [B, L, D] or [B, D]."""
        norm = None if self._norm is None else self.net.get_submodule(self._norm)
        if norm is None or (isinstance(norm, nn.Identity) and kind == "class_token_norm"):
            self._lacks(kind, "it has no final norm")
        kept: list[Tensor] = []
        handle = norm.register_forward_hook(
            lambda _, given, out: kept.append(given[0] if kind == "class_token" else out)
        )
        try:
            self.net(images)
        finally:
            handle.remove()
        return kept[-1]

    def _lacks(self, kind: str, why: str) -> NoReturn:
        native = "" if self.native is None else f"; feature=native takes {self.native.feature}"
        raise UserError(f"{self.card.where}: has no feature {kind}: {why}{native}")

    @torch.no_grad()
    def check(self, kind: str) -> "ForeignBackbone":
        """Try a feature on one gray image, to refuse early what does not work.

        Returns:
            Itself.

        Raises:
            UserError: if the network has no such feature or does not take images of this size.
        """
        size = self.img_size
        try:
            rows = self.feature(torch.zeros(1, 3, size, size), kind)
        except UserError:
            raise
        except Exception as error:  # libraries raise anything where shapes do not fit
            raise UserError(
                f"{self.card.where}: {self.card.library} does not take images of {size} x {size} "
                f"px ({brief(error)})"
            ) from error
        if rows.ndim != 2 or not bool(rows.isfinite().all()):
            raise UserError(f"{self.card.where}: features are not finite rows, one per image")
        self.embed_dim = rows.shape[1]
        return self

    def fresh(self) -> "ForeignBackbone":
        """The same network with new random weights."""
        return ForeignBackbone(self.card.build(), self._norm, self.card)
