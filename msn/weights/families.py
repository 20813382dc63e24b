"""The native feature of each family of backbones, with the source that says so."""

import re
from typing import NamedTuple

NATIVE = "native"
POOLED = "pooled"


class Native(NamedTuple):
    """The feature of an image that a family itself uses."""

    feature: str
    """`class_token` (before the final norm), `class_token_norm`, `patch_mean` (both after it), or
    `pooled` (as the library pools for a classifier)."""
    source: str
    """The paper or program that says so."""


PAPER = Native("class_token", "MSN, arXiv 2204.07141, A.2: before the final norm")
TIMM = Native("class_token_norm", "timm's own output with num_classes=0")
_VIT = Native("class_token_norm", "ViT, arXiv 2010.11929, Equation 4")
DINO = Native("class_token_norm", "DINO, its eval_knn.py: what the network gives")
DINOV2 = Native("class_token_norm", "DINOv2, its hub models: x_norm_clstoken")
DINOV3 = Native("class_token_norm", "DINOv3, its hub models: x_norm_clstoken")
MAE = Native("class_token_norm", "MAE, its main_linprobe.py: the class token")
FINE_TUNED_MAE = Native("patch_mean_norm", "MAE, its models_vit.py: global_pool and fc_norm")
_IJEPA = Native("patch_mean", "I-JEPA, arXiv 2301.08243, appendix A: average-pooled patches")
_BEIT = Native("pooled", "BEiT, arXiv 2106.08254: average of the patches, as for fine-tuning")
_DATA2VEC = Native("patch_mean", "data2vec, arXiv 2202.03555: mean of the last block's output")
_CLIP = Native("pooled", "CLIP, arXiv 2103.00020, A.3: class token before the projection")
_SIGLIP = Native("pooled", "SigLIP, arXiv 2303.15343: attention pooling (MAP head)")
_LIBRARY = Native("pooled", "what the library gives its classifier")

# `model_type` of transformers -> feature.
_HUGGING_FACE = {
    "vit_msn": PAPER,
    **dict.fromkeys(("vit", "deit"), _VIT),
    "vit_mae": MAE,
    **dict.fromkeys(("dinov2", "dinov2_with_registers"), DINOV2),
    "dinov3_vit": DINOV3,
    "ijepa": _IJEPA,
    "beit": _BEIT,
    "data2vec-vision": _DATA2VEC,
    **dict.fromkeys(("clip", "clip_vision_model"), _CLIP),
    **dict.fromkeys(("siglip", "siglip_vision_model"), _SIGLIP),
    **dict.fromkeys(("aimv2", "aimv2_vision_model", "pixio", "swin", "swinv2"), _LIBRARY),
    **dict.fromkeys(("convnext", "convnextv2", "dinov3_convnext", "resnet", "hiera"), _LIBRARY),
}
# Patterns of timm's names -> feature. All other models take timm's `num_classes=0` output.
_TIMM = (
    (r"dinov3|eupe|lingbot", DINOV3),
    (r"^vit_.*dinov2|franca", DINOV2),
    (r"^vit_.*\.dino$", DINO),
    (r"^vit_.*\.mae$", MAE),
    (r"^vit_.*ijepa", _IJEPA),
    (r"^vit_.*siglip", _SIGLIP),
    (r"^vit_.*clip", _CLIP),
    (r"^beit", _BEIT),
)


def native_of_timm(name: str) -> Native:
    """The feature of a model of timm, by its name with tag."""
    found = (native for pattern, native in _TIMM if re.search(pattern, name))
    return next(found, Native(POOLED, "timm's own output with num_classes=0"))


def native_of_hugging_face(model_type: str) -> Native | None:
    """The feature of a family of transformers; None if unknown."""
    return _HUGGING_FACE.get(model_type)
