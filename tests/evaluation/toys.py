"""Small labelled images in memory, with the interface of the data room."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from msn.data.dataset import REPLACED
from msn.evaluation.backbones import FrozenBackbone
from msn.evaluation.sets import FeatureSet
from msn.method.vit import VisionTransformer

MODEL = {
    "img_size": 16,
    "patch_size": 4,
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 2,
    "mlp_ratio": 2.0,
}
FEATURES = {"feature": "class_token", "image_size": None, "batch_size": 8, "precision": "32"}
LOGISTIC = {
    "lambd": 0.0025,
    "lambd_grid": None,
    "folds": 5,
    "intercept": False,
    "tolerance": 1e-8,
    "max_evaluations": 500,
}


class ToyImages:
    """Images whose hue tells their class, with noise; others stand in for unreadable ones."""

    def __init__(
        self,
        per_class: int,
        num_classes: int = 3,
        *,
        seed: int = 0,
        size: int = 20,
        unreadable: Sequence[int] = (),
    ) -> None:
        self.unreadable = unreadable
        generator = torch.Generator().manual_seed(seed)
        palette = torch.rand(num_classes, 3, generator=torch.Generator().manual_seed(99))
        self.labels = torch.arange(num_classes).repeat_interleave(per_class)
        self.classes = [f"class{i}" for i in range(num_classes)]
        self.names = [
            f"class{label}/{i}.png" for label in range(num_classes) for i in range(per_class)
        ]
        noise = torch.rand(len(self.labels), size, size, 3, generator=generator)
        pixels = 0.6 * palette[self.labels][:, None, None] + 0.4 * noise
        self.pixels = (255 * pixels).to(torch.uint8)
        self.opened: list[int] = []
        self.groups: Tensor | None = None

    def identity(self, i: int) -> str:
        return f"{self.names[i]} {int(self.pixels[i].sum())}"

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> Image.Image:
        self.opened.append(i)
        image = Image.fromarray(self.pixels[i].numpy())
        if i in self.unreadable:
            image.info[REPLACED] = True  # as `LabelledImages` says it
        return image


def toy_trunk(seed: int = 0, **changes: int) -> VisionTransformer:
    torch.manual_seed(seed)
    return VisionTransformer(**{**MODEL, **changes}).eval()


def toy_backbone(seed: int = 0, name: str = "msn") -> FrozenBackbone:
    return FrozenBackbone(name, toy_trunk(seed), MODEL["img_size"])


def toy_features(
    per_class: int, num_classes: int, width: int, *, spread: float, seed: int
) -> FeatureSet:
    """Gaussian classes: the same means for every seed, `spread` times unit noise around them."""
    means = torch.randn(num_classes, width, generator=torch.Generator().manual_seed(123))
    labels = torch.arange(num_classes).repeat_interleave(per_class)
    noise = torch.randn(len(labels), width, generator=torch.Generator().manual_seed(seed))
    return FeatureSet(means[labels] + spread * noise, labels, names(num_classes))


def names(count: int) -> Sequence[str]:
    return [f"class{i}" for i in range(count)]


def unit_rows(
    count: int, width: int, *, seed: int = 0, dtype: torch.dtype = torch.float64
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, width, generator=generator, dtype=dtype)
    return torch.nn.functional.normalize(rows - rows.mean(dim=1, keepdim=True), dim=1)
