"""One transformer block over the packed tokens of views of several sizes.

Legend: B images, L tokens of one image (class token first), D embedding width, d width of a head,
T tokens of all views together.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention
from timm.models.vision_transformer import Block as TimmBlock
from torch import Tensor

# (number of images, tokens an image) of each view size in a packed [T, D] matrix.
Groups = Sequence[tuple[int, int]]


class Block(TimmBlock):
    """timm's pre-norm block, applied to packed tokens [T, D] with attention inside each image."""

    attn: Attention

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

        With one query an image, scores are (q W_k) x and the result W_v (weights x): keys and
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
