"""timm's directories (`local-dir:` and Hub layout), both ways; its weight names are ours."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import timm
import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn

from msn.errors import UserError
from msn.method.vit import LAYER_NORM_EPS
from msn.weights.architecture import NOT_YET
from msn.weights.weights import Weights, check_channels, differences, short_side, summary

# Model arguments that shapes tell, or that evaluation does not see.
_READ_ARGUMENTS = {
    *("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "in_chans"),
    *("num_classes", "global_pool", "class_token", "qkv_bias", "init_values", "reg_tokens"),
    *("pre_norm", "qk_norm", "fc_norm", "final_norm", "drop_rate", "drop_path_rate"),
    *("dynamic_img_size", "dynamic_img_pad", "strict_img_size", "weight_init"),
}
# Any plain ViT of timm would do: model_args overrides all six numbers.
ARCHITECTURE = "vit_small_patch16_224"


def config(
    model: Mapping[str, int | float], *, mean: Sequence[float], std: Sequence[float], licence: str
) -> dict[str, Any]:
    """`config.json` that `timm.create_model("local-dir:DIR", pretrained=True)` rebuilds.

    Raises:
        UserError: if the norms have another eps than timm's: its configurations cannot say so.
    """
    if "layer_norm_eps" in model:
        raise UserError(
            f"format=timm: cannot say layer_norm_eps={model['layer_norm_eps']:g}; "
            "format=huggingface can"
        )
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
    """What a timm `config.json` tells beyond shapes: heads, eps, normalisation and licence.

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
        check_channels(value, f"{where}: {key}", positive=key == "std")
    if isinstance(pretrained.get("license"), str):
        told["licence"] = pretrained["license"]
    for size in (arguments.get("img_size"), pretrained.get("input_size")):
        if isinstance(size, list) and len(set(size[-2:])) > 1:
            raise UserError(f"{where}: image size {str(size)[:80]}: only square images are read")
    if strange := sorted(set(arguments) - _READ_ARGUMENTS):
        raise UserError(f"{where}: model_args {', '.join(strange)[:80]}: cannot be read")
    model = named_model(content.get("architecture"), where)
    heads = arguments.get("num_heads")
    return told_by_model(model) | told | ({} if heads is None else {"num_heads": heads})


def named_model(name: Any, where: str) -> TimmVisionTransformer:
    """A plain vision transformer of timm by its name, on the meta device.

    Raises:
        UserError: if there is none, or it computes something that our trunk does not.
    """
    if not isinstance(name, str) or not timm.is_model(name):
        raise UserError(
            f"{where}: timm {timm.__version__} knows no architecture {str(name)[:80]!r}"
        )
    try:
        with torch.device("meta"):
            model = timm.create_model(name, pretrained=False)
    except Exception as error:  # timm's models raise what they like where they have no storage
        raise UserError(f"{where}: timm cannot build architecture {name!r}") from error
    if (
        not isinstance(model, TimmVisionTransformer)
        or type(model.patch_embed) is not PatchEmbed
        or type(model.blocks[0]) is not Block
    ):
        raise UserError(
            f"{where}: architecture {name!r} is not a plain vision transformer; {NOT_YET}"
        )
    activation = model.blocks[0].mlp.get_submodule("act")
    if not isinstance(activation, nn.GELU) or activation.approximate != "none":
        kind = type(activation).__name__
        raise UserError(f"{where}: architecture {name!r} computes {kind}, not exact GELU")
    return model


def told_by_model(model: TimmVisionTransformer) -> dict[str, Any]:
    """What a model of timm tells beyond shapes: heads, and eps where it is not ours."""
    # To the type checker a number of heads may be a module, as any attribute may.
    heads = int(model.blocks[0].get_submodule("attn").num_heads)  # type: ignore[arg-type]
    eps = getattr(model.blocks[0].get_submodule("norm1"), "eps", LAYER_NORM_EPS)
    return {"num_heads": heads} | ({} if eps == LAYER_NORM_EPS else {"layer_norm_eps": float(eps)})


def check_same_model(weights: Weights, model: TimmVisionTransformer, where: str) -> None:
    """Refuse weights that are not of the named model; the image size may be another one.

    Raises:
        UserError: naming at most ten differing keys and shapes.
    """
    expected = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith("head.") and name != "pos_embed"
    }
    found = {name: tensor for name, tensor in weights.trunk.items() if name != "pos_embed"}
    wrong = differences(found, expected)
    heads, named = weights.model["num_heads"], told_by_model(model)["num_heads"]
    if heads != named:
        wrong.append(f"it has {heads} attention heads instead of {named}")
    if wrong:
        raise UserError(f"{where}: the file is of another model: {summary(wrong)}")


def plain_timm(
    trunk: Mapping[str, Tensor], model: Mapping[str, int | float]
) -> TimmVisionTransformer:
    """A vision transformer of timm with our weights, in eval mode."""
    numbers = dict(model)
    norm = partial(nn.LayerNorm, eps=numbers.pop("layer_norm_eps", LAYER_NORM_EPS))
    # One mapping holds whole numbers and the ratio, which is none.
    other = TimmVisionTransformer(**numbers, num_classes=0, global_pool="token", norm_layer=norm)  # type: ignore[arg-type]
    other.load_state_dict(dict(trunk), strict=True)
    return other.eval()
