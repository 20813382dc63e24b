"""The transformer's blocks: timm's blocks applied to packed tokens of several view sizes.

Legend: B images, L tokens of one image (class token first, then registers, then patches),
D embedding width, d width of a head, T tokens of all views together.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block as TimmBlock
from torch import Tensor, nn

from msn.method.positions import rotate

# (number of images, tokens per image) of each view size in a packed [T, D] matrix.
Groups = Sequence[tuple[int, int]]
# Rotations of each view size (`Rope.rotations`); None without rotary positions.
Turns = Sequence[Tensor] | None


class PackedBlock(nn.Module, ABC):
    """A pre-norm block, applied to packed tokens [T, D] with attention inside each image."""

    # Modules of timm's blocks, which differ in their types.
    attn: Any
    norm1: Any
    norm2: Any
    mlp: Any

    def forward(
        self, tokens: Tensor, groups: Groups, turns: Turns = None, class_only: bool = False
    ) -> Tensor:
        """Transform every token, [T, D] -> [T, D], or see `class_tokens`.

        Both go through here, because compiling a module in place compiles its `forward`.
        """
        if class_only:
            return self.class_tokens(tokens, groups, turns)
        tokens = tokens + self.scaled(1, self._attend(self.norm1(tokens), groups, turns))
        return tokens + self.scaled(2, self.mlp(self.norm2(tokens)))

    @abstractmethod
    def qkv(self) -> tuple[Tensor, Tensor | None]:
        """Weight [3 D, D] and bias [3 D] of queries, keys and values."""

    @abstractmethod
    def scaled(self, branch: int, tokens: Tensor) -> Tensor:
        """Output of attention (1) or MLP (2), times the layer scale if there is one."""

    def class_tokens(self, tokens: Tensor, groups: Groups, turns: Turns = None) -> Tensor:
        """The same block for class tokens only: exact, without the work for other tokens.

        With one query per image, scores are (q W_k) x and the result is W_v (weights x), without
        keys and values of all tokens. Only rotary keys are computed.

        Returns:
            Class tokens of all images, [sum of B, D].
        """
        normed = self.norm1(tokens)
        mixed, classes = [], []
        sizes = [batch * length for batch, length in groups]
        parts = zip(groups, tokens.split(sizes), normed.split(sizes), strict=True)
        for i, ((batch, length), rows, normed_rows) in enumerate(parts):
            turn = None if turns is None else turns[i]
            mixed.append(self._attend_from_class(normed_rows.view(batch, length, -1), turn))
            classes.append(rows.view(batch, length, -1)[:, 0])
        out = torch.cat(classes) + self.scaled(1, self.attn.proj(torch.cat(mixed)))
        return out + self.scaled(2, self.mlp(self.norm2(out)))

    def _attend_from_class(self, normed: Tensor, turn: Tensor | None) -> Tensor:
        """Attention with the class token as the only query, [B, L, D] -> [B, D]."""
        heads, width = self.attn.num_heads, normed.shape[-1]
        weight, bias = self.qkv()
        # [D, D] and [D] each, of queries, keys and values. The keys' bias adds the same to all
        # scores of a query, so it has no effect; rotary keys have none.
        query_weight, key_weight, value_weight = weight.chunk(3)
        query_bias, _, value_bias = (None, None, None) if bias is None else bias.chunk(3)
        queries = F.linear(normed[:, 0], query_weight, query_bias) * (width // heads) ** -0.5
        queries = queries.view(-1, heads, width // heads).transpose(0, 1)  # [heads, B, d]
        if turn is None:
            seeing = queries @ key_weight.view(heads, -1, width)  # [heads, B, D]
            seeing, seen = seeing.transpose(0, 1), normed.transpose(1, 2)
        else:
            keys = F.linear(normed, key_weight).unflatten(-1, (heads, -1)).transpose(1, 2)
            seeing = queries.transpose(0, 1).unsqueeze(-2)  # [B, heads, 1, d]
            seen = rotate(keys, turn).mT  # [B, heads, d, L]
        # Scores are not rounded to the autocast type; fused attention does not round them either.
        with _no_autocast(normed.device.type):
            wide = torch.promote_types(normed.dtype, torch.float32)
            scores = seeing.to(wide) @ seen.to(wide)
        if turn is not None:
            scores = scores.squeeze(-2)
        mixed = scores.softmax(dim=-1).to(normed.dtype) @ normed  # [B, heads, D]
        out = mixed.transpose(0, 1) @ value_weight.view(heads, -1, width).transpose(1, 2)
        out = out.transpose(0, 1).flatten(1)
        return out if value_bias is None else out + value_bias

    def _attend(self, tokens: Tensor, groups: Groups, turns: Turns) -> Tensor:
        packed = F.linear(tokens, *self.qkv()).split([batch * length for batch, length in groups])
        attended = []
        for i, ((batch, length), qkv) in enumerate(zip(groups, packed, strict=True)):
            # [B*L, 3D] -> three times [B, heads, L, d]
            by_head = qkv.view(batch, length, 3, self.attn.num_heads, -1).permute(2, 0, 3, 1, 4)
            query, key, value = by_head
            if turns is not None:
                query, key = rotate(query, turns[i]), rotate(key, turns[i])
            out = F.scaled_dot_product_attention(query, key, value)
            attended.append(out.transpose(1, 2).reshape(batch * length, -1))
        return self.attn.proj(torch.cat(attended))


# timm's blocks take tokens of one image size, [B, L, D].
class Block(PackedBlock, TimmBlock):  # type: ignore[misc]
    """timm's block of `vit_...`: plain trunks and DINOv2."""

    def qkv(self) -> tuple[Tensor, Tensor | None]:
        """See `PackedBlock`."""
        return self.attn.qkv.weight, self.attn.qkv.bias

    def scaled(self, branch: int, tokens: Tensor) -> Tensor:
        """See `PackedBlock`."""
        return self.ls1(tokens) if branch == 1 else self.ls2(tokens)


class RotaryBlock(PackedBlock, EvaBlock):  # type: ignore[misc]
    """timm's block of `vit_..._dinov3`: queries and values have a bias, or none."""

    def qkv(self) -> tuple[Tensor, Tensor | None]:
        """See `PackedBlock`."""
        weight = self.attn.qkv.weight
        if self.attn.q_bias is None:
            return weight, None
        return weight, torch.cat([self.attn.q_bias, self.attn.k_bias, self.attn.v_bias])

    def scaled(self, branch: int, tokens: Tensor) -> Tensor:
        """See `PackedBlock`."""
        gamma = self.gamma_1 if branch == 1 else self.gamma_2
        return tokens if gamma is None else gamma * tokens


def _no_autocast(device_type: str) -> AbstractContextManager[object]:
    """Autocast off; the meta device has none."""
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)
