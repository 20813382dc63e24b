"""A step of lightly's MSN, put together as its documentation does, where lightly is installed."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class LightlyStep:
    """Forward, backward, AdamW and EMA of lightly's example.

    It masks focal views too (the paper leaves them whole), so it computes less than MSN does; it
    knows neither clipping nor weight decay that changes.

    Args:
        model: the six numbers of the trunk.
        method: settings of the method.
        views: target, rand and focal, as `msn.data.views.Views`.
        device: where to step.
    """

    def __init__(
        self,
        model: Mapping[str, Any],
        method: Mapping[str, Any],
        views: tuple[Tensor, ...],
        device: torch.device,
    ) -> None:
        from lightly.loss import MSNLoss
        from lightly.models.modules import MaskedVisionTransformerTIMM
        from lightly.models.modules.heads import MSNProjectionHead
        from timm.models.vision_transformer import VisionTransformer

        vit = VisionTransformer(**model, num_classes=0, dynamic_img_size=True)
        head = method["head"]
        self.target = MaskedVisionTransformerTIMM(vit=vit).to(device)
        self.target_head = MSNProjectionHead(
            model["embed_dim"], head["hidden_dim"], head["output_dim"]
        ).to(device)
        self.anchor, self.anchor_head = (
            copy.deepcopy(self.target),
            copy.deepcopy(self.target_head),
        )
        self.pairs = ((self.anchor, self.target), (self.anchor_head, self.target_head))
        for _, module in self.pairs:
            module.requires_grad_(False)
        prototypes = nn.Linear(head["output_dim"], method["num_prototypes"], bias=False)
        self.prototypes = prototypes.to(device).weight
        self.criterion = MSNLoss()
        anchors = [*self.anchor.parameters(), *self.anchor_head.parameters(), self.prototypes]
        self.optimizer = torch.optim.AdamW(anchors, lr=1.5e-4)
        self.views, self.patch_size = views, model["patch_size"]
        self.patch_drop, self.momentum = method["patch_drop"], method["momentum"]

    def step(self) -> None:
        """One step of the example."""
        from lightly.models.utils import update_momentum

        target, rand, focal = self.views
        for anchor, ema in self.pairs:
            update_momentum(anchor, ema, self.momentum)
        wanted = self.target_head(self.target(images=target))
        got = torch.cat([self._masked(rand.flatten(0, 1)), self._masked(focal.flatten(0, 1))])
        loss = self.criterion(got, wanted, self.prototypes.data)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def _masked(self, images: Tensor) -> Tensor:
        from lightly.models.utils import random_token_mask

        length = (images.shape[-1] // self.patch_size) ** 2
        kept, _ = random_token_mask(
            size=(len(images), length), mask_ratio=self.patch_drop, device=images.device
        )
        return self.anchor_head(self.anchor(images=images, idx_keep=kept))
