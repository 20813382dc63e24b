"""The yardstick of `benchmarks/step.py`: a training step of MSN as a plain program would take it.

The same method, eager and in the dtype of its weights, with none of the product's fast paths: the
views of a size go through the whole trunk by themselves, every patch is embedded before patches
are dropped, attention is two matrix products and a softmax, the last block runs in full, the loss
works on probabilities `[V*B, K]`, AdamW and EMA take parameter by parameter. Written from the
paper and the method's facts for this comparison; tests hold its numbers equal to the product's.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Numbers(NamedTuple):
    """What a step needs besides weights and views."""

    lr: float
    weight_decay: float
    momentum: float
    temperature: float
    sharpen_temperature: float
    sinkhorn_iterations: int
    """0 leaves the targets unbalanced."""
    me_max_weight: float
    clip_grad_norm: float


class Attention(nn.Module):
    """Self-attention with its matrix of weights in memory, [B, L, D] -> [B, L, D]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        batch, length, width = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        scores = (query @ key.transpose(-2, -1)) * (width // self.heads) ** -0.5
        mixed = scores.softmax(dim=-1) @ value
        return self.proj(mixed.transpose(1, 2).reshape(batch, length, width))


class Mlp(nn.Module):
    """Two layers with GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.mlp = Mlp(width, int(width * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """Convolution over all patches, [B, 3, h, w] -> [B, D, rows, columns]."""

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch_size, patch_size)

    def forward(self, images: Tensor) -> Tensor:  # noqa: D102
        return self.proj(images)


class Trunk(nn.Module):
    """Vision transformer; class token after the final norm."""

    def __init__(self, model: Mapping[str, Any]) -> None:
        super().__init__()
        width, patch = model["embed_dim"], model["patch_size"]
        self.side = model["img_size"] // patch
        self.patch_embed = PatchEmbed(patch, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.side**2, width))
        self.blocks = nn.ModuleList(
            Block(width, model["num_heads"], model["mlp_ratio"]) for _ in range(model["depth"])
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, images: Tensor, kept: Tensor | None) -> Tensor:
        """[B, 3, h, w] -> [B, D]; `kept` [M]: the patches to keep of every image."""
        patches = self.patch_embed(images)
        positions = self._positions(patches.shape[2], patches.shape[3])
        tokens = patches.flatten(2).transpose(1, 2) + positions[:, 1:]
        if kept is not None:
            tokens = tokens[:, kept]
        classes = (self.cls_token + positions[:, :1]).expand(len(images), -1, -1)
        tokens = torch.cat([classes, tokens], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)[:, 0]

    def _positions(self, rows: int, columns: int) -> Tensor:
        if (rows, columns) == (self.side, self.side):
            return self.pos_embed
        image = self.pos_embed[:, 1:].unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)
        resized = F.interpolate(image, size=(rows, columns), mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], resized.flatten(2).transpose(1, 2)], dim=1)


class Head(nn.Module):
    """Three layers with BatchNorm and GELU."""

    def __init__(self, width: int, hidden_dim: int, output_dim: int) -> None:
        super().__init__()
        self.fc1, self.bn1 = nn.Linear(width, hidden_dim), nn.BatchNorm1d(hidden_dim)
        self.fc2, self.bn2 = nn.Linear(hidden_dim, hidden_dim), nn.BatchNorm1d(hidden_dim)
        self.fc3 = nn.Linear(hidden_dim, output_dim)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        x = F.gelu(self.bn1(self.fc1(x)))
        return self.fc3(F.gelu(self.bn2(self.fc2(x))))


class Encoder(nn.Module):
    """Trunk and head of one view size after the other."""

    def __init__(self, model: Mapping[str, Any], head: Mapping[str, Any]) -> None:
        super().__init__()
        self.trunk = Trunk(model)
        self.head = Head(model["embed_dim"], head["hidden_dim"], head["output_dim"])

    def forward(self, images: Tensor, kept: Tensor | None) -> Tensor:
        """[B, 3, h, w] -> [B, P]."""
        return self.head(self.trunk(images, kept))


class Yardstick(nn.Module):
    """Anchor, target, prototypes and their optimiser; parameter names are the product's.

    Args:
        model: the six numbers of the trunk.
        head: hidden_dim and output_dim; BatchNorm is always on.
        num_prototypes: K.
    """

    def __init__(
        self, *, model: Mapping[str, Any], head: Mapping[str, Any], num_prototypes: int
    ) -> None:
        super().__init__()
        self.anchor, self.target = Encoder(model, head), Encoder(model, head)
        self.target.requires_grad_(False)
        self.prototypes = nn.Parameter(torch.zeros(num_prototypes, head["output_dim"]))

    def build_optimizer(self) -> torch.optim.AdamW:
        """AdamW, one parameter after the other."""
        trained = list(self.anchor.parameters())
        return torch.optim.AdamW(
            [
                {"params": [p for p in trained if p.ndim > 1]},
                {"params": [p for p in trained if p.ndim <= 1] + [self.prototypes]},
            ],
            foreach=False,
            fused=False,
        )

    def loss(
        self, target: Tensor, rand: Tensor, focal: Tensor, kept: Tensor | None, numbers: Numbers
    ) -> Tensor:
        """The loss of a batch; arguments as `msn.method.network.MSN.forward`, `kept` [M]."""
        anchors = [self.anchor(rand.flatten(0, 1), kept), self.anchor(focal.flatten(0, 1), None)]
        with torch.no_grad():
            wanted = self.target(target, None)
            targets = self._probabilities(wanted, numbers.temperature)
            targets = targets ** (1 / numbers.sharpen_temperature)
            targets = targets / targets.sum(dim=1, keepdim=True)
            targets = _balance(targets, numbers.sinkhorn_iterations)
        probs = self._probabilities(torch.cat(anchors), numbers.temperature)  # [V*B, K]
        repeated = targets.repeat(len(probs) // len(targets), 1)
        cross_entropy = -(repeated * probs.log()).sum(dim=1).mean()
        mean = probs.mean(dim=0)
        me_max = (mean * mean.log()).sum() + torch.tensor(float(mean.numel())).log()
        return cross_entropy + numbers.me_max_weight * me_max

    def step(
        self,
        optimizer: torch.optim.Optimizer,
        views: tuple[Tensor, Tensor, Tensor],
        kept: Tensor | None,
        numbers: Numbers,
    ) -> Tensor:
        """Forward, backward, clip, AdamW, EMA; the loss."""
        decayed, free = optimizer.param_groups
        decayed.update(lr=numbers.lr, weight_decay=numbers.weight_decay)
        free.update(lr=numbers.lr, weight_decay=0.0)
        optimizer.zero_grad()
        loss = self.loss(*views, kept, numbers)
        loss.backward()
        nn.utils.clip_grad_norm_(self.anchor.parameters(), numbers.clip_grad_norm, foreach=False)
        optimizer.step()
        with torch.no_grad():
            pairs = zip(self.target.parameters(), self.anchor.parameters(), strict=True)
            for ours, theirs in pairs:
                ours.mul_(numbers.momentum).add_((1 - numbers.momentum) * theirs)
        return loss.detach()

    def _probabilities(self, projections: Tensor, temperature: float) -> Tensor:
        cosines = F.normalize(projections, dim=1) @ F.normalize(self.prototypes, dim=1).T
        return (cosines / temperature).softmax(dim=1)


def _balance(targets: Tensor, iterations: int) -> Tensor:
    """Sinkhorn-Knopp on probabilities [B, K]."""
    for _ in range(iterations):
        targets = targets / targets.sum(dim=0, keepdim=True)
        targets = targets / targets.sum(dim=1, keepdim=True)
    return targets
