"""What the paper reports (arXiv 2204.07141, Tables 1 to 4; ImageNet-1k top-1)."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

IMAGENET_CLASSES = 1000


class PaperFigure(NamedTuple):
    """A published accuracy."""

    model: str
    top1: float
    """Fraction."""
    std: float | None
    """Over the three splits; None where there is one."""


# (embed_dim, depth, patch_size) of each model.
_MODELS = {
    (384, 12, 16): "ViT-S/16",
    (768, 12, 16): "ViT-B/16",
    (768, 12, 8): "ViT-B/8",
    (768, 12, 4): "ViT-B/4",
    (1024, 24, 7): "ViT-L/7",
}
_FIGURES: dict[str, dict[tuple[str, str], tuple[float, float | None]]] = {
    "ViT-S/16": {
        ("logistic", "1"): (0.471, 0.001),
        ("logistic", "2"): (0.558, 0.006),
        ("logistic", "5"): (0.628, 0.003),
        ("logistic", "1%"): (0.672, None),
        ("linear", "all"): (0.769, None),
    },
    "ViT-B/16": {
        ("logistic", "1"): (0.498, 0.002),
        ("logistic", "2"): (0.589, 0.004),
        ("logistic", "5"): (0.655, 0.003),
        ("logistic", "1%"): (0.695, None),
        ("finetune", "all"): (0.834, None),
    },
    "ViT-B/8": {
        ("logistic", "1"): (0.551, 0.001),
        ("logistic", "2"): (0.649, 0.007),
        ("logistic", "5"): (0.716, 0.003),
    },
    "ViT-B/4": {
        ("logistic", "1"): (0.543, 0.004),
        ("logistic", "2"): (0.646, 0.007),
        ("logistic", "5"): (0.724, 0.003),
        ("logistic", "1%"): (0.757, None),
    },
    "ViT-L/7": {
        ("logistic", "1"): (0.571, 0.006),
        ("logistic", "2"): (0.664, 0.006),
        ("logistic", "5"): (0.721, 0.002),
        ("logistic", "1%"): (0.751, None),
        ("linear", "all"): (0.807, None),
    },
}


def is_imagenet(classes: Sequence[str]) -> bool:
    """Whether class names are those of ImageNet-1k: a thousand WordNet ids."""
    return len(classes) == IMAGENET_CLASSES and all(
        re.fullmatch(r"n\d{8}", name) for name in classes
    )


def paper_figure(
    model: Mapping[str, int | float], classifier: str, labels: str
) -> PaperFigure | None:
    """The paper's figure for an architecture on ImageNet-1k, None where it has none.

    Args:
        model: the six numbers of `VisionTransformer`.
        classifier: `logistic`, `linear`, `finetune` or `knn`.
        labels: `1`, `2`, `5`, `1%` or `all`.
    """
    name = _MODELS.get((int(model["embed_dim"]), int(model["depth"]), int(model["patch_size"])))
    found = _FIGURES.get(name, {}).get((classifier, labels)) if name else None
    return None if name is None or found is None else PaperFigure(name, *found)
