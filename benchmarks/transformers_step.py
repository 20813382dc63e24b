"""A step of transformers' ViTMAEForPreTraining in the plainest loop, to compare with."""

import torch
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from msn.commands.step import Case, random_views, weight_type


class TransformersStep:
    """Forward with noise, backward, fused AdamW; the same sizes, SDPA attention, float32."""

    def __init__(self, case: Case) -> None:
        model, method, decoder = case.model, case.method, case.method["decoder"]
        self.model = ViTMAEForPreTraining(
            ViTMAEConfig(
                hidden_size=model["embed_dim"],
                num_hidden_layers=model["depth"],
                num_attention_heads=model["num_heads"],
                intermediate_size=int(model["mlp_ratio"] * model["embed_dim"]),
                image_size=model["img_size"],
                patch_size=model["patch_size"],
                decoder_hidden_size=decoder["embed_dim"],
                decoder_num_hidden_layers=decoder["depth"],
                decoder_num_attention_heads=decoder["num_heads"],
                decoder_intermediate_size=4 * decoder["embed_dim"],
                mask_ratio=method["mask_ratio"],
                norm_pix_loss=method["norm_pix_loss"],
                layer_norm_eps=1e-6,
                attn_implementation="sdpa",
            )
        )
        self.model.to(case.device, weight_type(case.precision)).train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.05},
                {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
            ],
            lr=method["lr"],
            betas=tuple(method["betas"]),
            fused=True,
        )
        self.images = random_views(case, dtype=weight_type(case.precision)).target

    def step(self) -> None:
        """One plain step."""
        patches = (self.images.shape[-1] // self.model.config.patch_size) ** 2
        noise = torch.rand(len(self.images), patches, device=self.images.device)
        self.model(self.images, noise=noise).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
