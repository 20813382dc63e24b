"""Anchor, EMA target, projection head and prototypes (paper section 3, Figure 2).

Legend: V anchor views, R rand views, F focal views, B images, D embedding width, P projection
width, K prototypes.
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from msn.method.distributed import BatchNorm
from msn.method.vit import VisionTransformer, init_linear
from msn.schema import whole_number


class Network(nn.Module, ABC):
    """What training needs of a network, whatever its method."""

    @property
    @abstractmethod
    def backbone(self) -> VisionTransformer:
        """The trunk that is evaluated and exported."""

    @property
    @abstractmethod
    def learner(self) -> nn.Module:
        """The module that is trained with weight decay and clipping (if the method clips)."""

    @property
    def undecayed(self) -> list[nn.Parameter]:
        """Further trained parameters, neither decayed nor clipped."""
        return []

    @property
    @abstractmethod
    def stacks(self) -> list[nn.ModuleList]:
        """Stacks of blocks; each block is compiled, and sharded (FSDP2), by itself."""


class Projections(NamedTuple):
    """The two inputs of the loss."""

    anchor: Tensor  # rand then focal views, [V, B, P]
    target: Tensor  # the unmasked view through the EMA target, without gradient, [B, P]


class ProjectionHead(nn.Module):
    """Three layers D -> hidden -> hidden -> P with GELU (paper A.1).

    Args:
        embed_dim: D.
        hidden_dim: width of both hidden layers.
        output_dim: P.
        use_batch_norm: normalise both hidden layers over the batch of all processes.
    """

    def __init__(
        self, embed_dim: int, *, hidden_dim: int, output_dim: int, use_batch_norm: bool
    ) -> None:
        super().__init__()
        whole_number("head.hidden_dim", hidden_dim, 1)
        whole_number("head.output_dim", output_dim, 1)
        self.config = {
            "hidden_dim": hidden_dim,
            "output_dim": output_dim,
            "use_batch_norm": use_batch_norm,
        }
        self.fc1 = nn.Linear(embed_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, hidden_dim)
        self.fc3 = nn.Linear(hidden_dim, output_dim)
        if use_batch_norm:
            self.bn1, self.bn2 = BatchNorm(hidden_dim), BatchNorm(hidden_dim)
        else:
            self.bn1 = self.bn2 = nn.Identity()  # type: ignore[assignment]
        self.apply(init_linear)

    def forward(self, class_tokens: Tensor) -> Tensor:
        """[..., D] -> [..., P]; batch statistics run over all leading axes together."""
        rows = class_tokens.flatten(0, -2)
        rows = F.gelu(self.bn1(self.fc1(rows)))
        rows = F.gelu(self.bn2(self.fc2(rows)))
        return self.fc3(rows).unflatten(0, class_tokens.shape[:-1])


class Encoder(nn.Module):
    """Trunk and projection head; one of these is the anchor, a second one the target.

    Args:
        model: arguments of `VisionTransformer`.
        head: arguments of `ProjectionHead` without `embed_dim`.
    """

    def __init__(self, model: Mapping[str, int | float], head: Mapping[str, int | bool]) -> None:
        super().__init__()
        self.trunk = VisionTransformer(**model)  # type: ignore[arg-type]
        self.head = ProjectionHead(self.trunk.embed_dim, **head)  # type: ignore[arg-type]

    def forward(
        self,
        views: Sequence[Tensor],
        kept: Sequence[Tensor | None],
        chunk_size: int | None = None,
    ) -> list[Tensor]:
        """Project views of several sizes; the head sees each size's views as one batch.

        Args:
            views: one tensor per view size, each [views, B, 3, h, w].
            kept: patches to keep for each, see `VisionTransformer.forward`.
            chunk_size: images per trunk pass; the trunk has no batch statistics, so chunks (whose
                activations are recomputed in the backward pass) change memory, not numbers.

        Returns:
            For each of `views` its projections, [views, B, P].
        """
        if chunk_size is None:
            return [self.head(tokens) for tokens in self.trunk(views, kept)]
        run: Callable[..., list[Tensor]] = self.trunk
        if torch.is_grad_enabled():  # nothing in the trunk is random
            run = partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
        parts = []
        for start in range(0, views[0].shape[1], chunk_size):
            images = slice(start, start + chunk_size)
            chunk = [view[:, images] for view in views]
            parts.append(
                run(chunk, [k if k is None or k.ndim == 1 else k[:, images] for k in kept])
            )
        return [self.head(torch.cat(tokens, dim=1)) for tokens in zip(*parts, strict=True)]


class MSN(Network):
    """The network of Masked Siamese Networks: everything that has parameters.

    Args:
        model: arguments of `VisionTransformer`.
        head: arguments of `ProjectionHead` without `embed_dim`.
        num_prototypes: K, >= 2.
    """

    def __init__(
        self,
        *,
        model: Mapping[str, int | float],
        head: Mapping[str, int | bool],
        num_prototypes: int,
    ) -> None:
        super().__init__()
        whole_number("num_prototypes", num_prototypes, 2)
        self.anchor = Encoder(model, head)
        self.target = copy.deepcopy(self.anchor).requires_grad_(False)
        width = int(head["output_dim"])
        self.prototypes = nn.Parameter(torch.empty(num_prototypes, width))
        nn.init.uniform_(self.prototypes, -1 / math.sqrt(width), 1 / math.sqrt(width))

    @property
    def backbone(self) -> VisionTransformer:
        """The target's trunk."""
        return self.target.trunk

    @property
    def learner(self) -> nn.Module:
        """The anchor encoder."""
        return self.anchor

    @property
    def undecayed(self) -> list[nn.Parameter]:
        """The prototypes."""
        return [self.prototypes]

    @property
    def stacks(self) -> list[nn.ModuleList]:
        """Blocks of both trunks."""
        return [self.anchor.trunk.blocks, self.target.trunk.blocks]

    def forward(
        self,
        target: Tensor,
        rand: Tensor,
        focal: Tensor,
        kept: Tensor | None,
        chunk_size: int | None = None,
    ) -> Projections:
        """Project all views of a batch.

        Args:
            target: unmasked large view, [B, 3, S, S].
            rand: masked large views, [R, B, 3, S, S].
            focal: small views, never masked, [F, B, 3, s, s].
            kept: patches that rand views keep, [M] or [R, B, M]; None keeps all.
            chunk_size: images per trunk pass (`Encoder.forward`); None takes all at once.
        """
        projected = self.project_target(target, chunk_size)
        return Projections(self.project_anchors(rand, focal, kept, chunk_size), projected)

    @torch.no_grad()
    def project_target(self, target: Tensor, chunk_size: int | None = None) -> Tensor:
        """The unmasked view through the target, [B, 3, S, S] -> [B, P], without gradient."""
        (out,) = self.target([target.unsqueeze(0)], [None], chunk_size)
        return out[0]

    def project_anchors(
        self, rand: Tensor, focal: Tensor, kept: Tensor | None, chunk_size: int | None = None
    ) -> Tensor:
        """Rand then focal views through the anchor, [V, B, P]; arguments as of `forward`."""
        groups = [(rand, kept), (focal, None)]
        present = [(views, keep) for views, keep in groups if views.shape[0] > 0]
        out = self.anchor([v for v, _ in present], [k for _, k in present], chunk_size)
        return torch.cat(out)

    @torch.no_grad()
    def update_target(self, momentum: float, skip: Tensor | None = None) -> None:
        """target <- momentum * target + (1 - momentum) * anchor, parameters only (paper A.1).

        BatchNorm buffers of the target are its own: it normalises by its own batches.

        Args:
            momentum: in [0, 1].
            skip: 1 if the optimiser step was skipped, so that the target stays; else 0. The host
                reads it only if it is on the CPU.
        """
        target: list[Tensor] = list(self.target.parameters())
        anchor: list[Tensor] = list(self.anchor.parameters())
        if skip is None or (skip.device.type == "cpu" and not skip):
            torch._foreach_lerp_(target, anchor, 1 - momentum)
        elif skip.device.type != "cpu":
            lerp_unless(skip, target, anchor, 1 - momentum)


def lerp_unless(skip: Tensor, start: list[Tensor], end: list[Tensor], weight: float) -> None:
    """start += weight * (end - start) where `skip` is 0, without the host reading it."""
    # Gradient descent on 1/2 ||start - end||^2, whose one fused kernel reads `skip` on the device:
    # the gradient is minus `end` (maximize) plus 1 times `start` (weight decay).
    torch._fused_sgd_(
        [_own_part(x) for x in start], [_own_part(x) for x in end], [],
        weight_decay=1.0, momentum=0.0, lr=weight, dampening=0.0, nesterov=False,
        maximize=True, is_first_step=False, found_inf=skip,
    )  # fmt: skip


def _own_part(x: Tensor) -> Tensor:
    """This process's part of a tensor that may be sharded."""
    return x.to_local() if isinstance(x, DTensor) else x
