"""A small trunk in DINOv2's or DINOv3's shape, trained with labels: see benchmarks/adaptation.md.

python benchmarks/foundation.py dinov2|dinov3 IMAGES OUT [EPOCHS] reads class folders of 32 px
images and writes a Hugging Face directory.
"""

import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.transforms.functional import pil_to_tensor
from transformers import (
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    ViTImageProcessor,
)

SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_register_tokens": 4,
    "image_size": 32,
    "patch_size": 8,
}
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def cut(images: torch.Tensor) -> torch.Tensor:
    """One random crop, flip and brightness for each image, [B, 3, 32, 32]."""
    count = len(images)
    scale = torch.empty(count, 2).uniform_(0.6, 1.0)
    turned = torch.where(torch.rand(count) < 0.5, -1.0, 1.0)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = scale[:, 0] * turned, scale[:, 1]
    theta[:, :, 2] = (1 - scale) * torch.empty(count, 2).uniform_(-1, 1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    crops = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    light = torch.empty(count, 1, 1, 1).uniform_(0.7, 1.3)
    return crops * light


def main(family: str, source: str, out: str, epochs: int = 70) -> None:
    """Train, and write trunk and processor."""
    torch.manual_seed(0)
    files = sorted(Path(source).glob("*/*"))
    names = sorted({file.parent.name for file in files})
    labels = torch.tensor([names.index(file.parent.name) for file in files])
    pixels = torch.stack([pil_to_tensor(Image.open(file).convert("RGB")) for file in files])
    images = (pixels / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    if family == "dinov2":
        trunk = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SHAPE))
    else:
        trunk = DINOv3ViTModel(DINOv3ViTConfig(**SHAPE, intermediate_size=256))
    head = nn.Linear(64, len(names))
    weights = [*trunk.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=2e-3, weight_decay=0.05)
    steps, step = epochs * (len(images) // 64), 0
    for epoch in range(epochs):
        hits = 0
        for chosen in torch.randperm(len(images))[: len(images) // 64 * 64].split(64):
            rate = min(1.0, step / 400) * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.param_groups[0]["lr"] = 2e-3 * rate
            found = head(trunk(pixel_values=cut(images[chosen])).last_hidden_state[:, 0])
            loss = F.cross_entropy(found, labels[chosen], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            hits += int((found.argmax(1) == labels[chosen]).sum())
            step += 1
        print(f"epoch {epoch}: {hits / len(images):.1%} of the training images", flush=True)
    trunk.save_pretrained(out)
    ViTImageProcessor(size=32, image_mean=MEAN, image_std=STD).save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:4], *map(int, sys.argv[4:]))
