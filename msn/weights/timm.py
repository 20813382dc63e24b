"""timm's directories (`local-dir:` and Hub layout), both ways; its weight names are ours."""

from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor

from msn.errors import UserError
from msn.weights.preprocessing import short_side
from msn.weights.weights import check_channels

# Any plain ViT of timm would do: model_args overrides all six numbers.
ARCHITECTURE = "vit_small_patch16_224"


def config(
    model: Mapping[str, int | float], *, mean: Sequence[float], std: Sequence[float], licence: str
) -> dict[str, Any]:
    """`config.json` that `timm.create_model("local-dir:DIR", pretrained=True)` rebuilds."""
    size = int(model["img_size"])
    return {
        "architecture": ARCHITECTURE,
        "num_classes": 0,
        "num_features": model["embed_dim"],
        "global_pool": "token",
        # Without num_classes: transformers gives that itself, and twice is an error.
        "model_args": {**model, "global_pool": "token"},
        "pretrained_cfg": {
            "tag": "msn",
            "custom_load": False,
            "input_size": [3, size, size],
            "fixed_input_size": True,
            "interpolation": "bilinear",
            "crop_pct": size / short_side(size),
            "crop_mode": "center",
            "mean": list(mean),
            "std": list(std),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": licence,
        },
    }


def told_by_config(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What a timm `config.json` tells beyond shapes: heads and normalisation.

    Raises:
        UserError: if the architecture is not one of timm's plain vision transformers.
    """
    # Old files hold the pretrained_cfg alone.
    pretrained = content.get("pretrained_cfg", content) or {}
    arguments = content.get("model_args") or {}
    if not isinstance(pretrained, dict) or not isinstance(arguments, dict):
        raise UserError(f"{where}: pretrained_cfg and model_args must be JSON objects")
    told = {key: pretrained[key] for key in ("mean", "std") if pretrained.get(key) is not None}
    for key, value in told.items():
        check_channels(value, f"{where}: {key}")
    if "license" in pretrained:
        told["licence"] = pretrained["license"]
    heads = arguments.get("num_heads")
    return {**told, "num_heads": _registered_heads(content, where) if heads is None else heads}


def plain_timm(
    trunk: Mapping[str, Tensor], model: Mapping[str, int | float]
) -> TimmVisionTransformer:
    """A vision transformer of timm with our weights, in eval mode."""
    other = TimmVisionTransformer(**model, num_classes=0, global_pool="token")  # type: ignore[arg-type]
    other.load_state_dict(dict(trunk), strict=True)
    return other.eval()


def _registered_heads(content: Mapping[str, Any], where: str) -> int:
    name = content.get("architecture")
    if not isinstance(name, str) or not timm.is_model(name):
        raise UserError(f"{where}: timm {timm.__version__} knows no architecture {name!r}")
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False)
    if not isinstance(model, TimmVisionTransformer):
        raise UserError(f"{where}: architecture {name!r} is not a plain vision transformer")
    return int(model.blocks[0].get_submodule("attn").num_heads)  # type: ignore[arg-type]
