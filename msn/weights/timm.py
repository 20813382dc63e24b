"""Read and write timm's directories (`local-dir:` and Hub layout), and build timm's twin models."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import timm
import torch
from timm.layers import GluMlp, PatchEmbed, RotaryEmbeddingDinoV3, SwiGLU
from timm.models.eva import Eva, EvaBlock
from timm.models.vision_transformer import Block
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn

from msn.errors import UserError
from msn.method.vit import LAYER_NORM_EPS, PLAIN, SIZES, exact_ratio
from msn.weights import dino
from msn.weights.architecture import NOT_OURS, OtherArchitecture
from msn.weights.weights import (
    Family,
    Weights,
    check_channels,
    differences,
    family_of,
    short_side,
    summary,
)

TimmModel = TimmVisionTransformer | Eva

# timm's model arguments that tensors do not give, and our names for them.
_ARGUMENTS = {"num_heads": "num_heads", "rope_temperature": "rope_base"}
# Model arguments that shapes give, or that have no effect on evaluation.
_READ_ARGUMENTS = {
    *("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "in_chans"),
    *("num_classes", "global_pool", "class_token", "qkv_bias", "init_values", "reg_tokens"),
    *("pre_norm", "qk_norm", "fc_norm", "final_norm", "drop_rate", "drop_path_rate"),
    *("dynamic_img_size", "dynamic_img_pad", "strict_img_size", "weight_init"),
    *("num_reg_tokens", "rope_temperature", "no_embed_class"),
}
# Patch, width, depth and heads of the models that timm has with MAE's weights.
_MAE_SIZES: dict[tuple[int | float, ...], str] = {
    (16, 768, 12, 12): "vit_base_patch16_224",
    (16, 1024, 24, 16): "vit_large_patch16_224",
    (14, 1280, 32, 16): "vit_huge_patch14_224",
}


def config(
    model: Mapping[str, Any],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    licence: str,
    tag: str = "msn",
) -> dict[str, Any]:
    """`config.json` that `timm.create_model("local-dir:DIR", pretrained=True)` rebuilds.

    With the tag `mae` it names timm's own model of the size, `vit_base_patch16_224.mae` and others.

    Raises:
        UserError: if the eps of the norms is not timm's, which its configurations cannot express.
    """
    eps = model.get("layer_norm_eps", LAYER_NORM_EPS)
    if eps != (dino.V3_EPS if family_of(model) is Family.DINOV3 else LAYER_NORM_EPS):
        raise UserError(
            f"format=timm: cannot express layer_norm_eps={eps:g}; format=huggingface can"
        )
    size = int(model["img_size"])
    name, arguments = architecture(model)
    return {
        "architecture": _MAE_SIZES.get(_sizes(model), name) if tag == "mae" else name,
        "num_classes": 0,
        "num_features": model["embed_dim"],
        "global_pool": "token",
        # Without num_classes: transformers gives that itself, and twice is an error.
        "model_args": {**arguments, "global_pool": "token"},
        "pretrained_cfg": {
            "tag": tag,
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


def architecture(model: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name of timm's model for a `VisionTransformer`'s arguments, and the arguments to change.

    Any model of the family would do: the arguments override all sizes. eps is not among them.
    """
    sizes = {name: model[name] for name in SIZES}
    model = {**PLAIN, **model}
    gated, registers = model["mlp"] == "swiglu", model["registers"]
    if model["position"] == "rope":
        plus, biased = "plus_" if gated else "", "_qkvb" if model["qkv_bias"] else ""
        options: dict[str, Any] = {
            "num_reg_tokens": 4,
            "rope_temperature": 100.0,
            "init_values": 1e-5,
        }
        chosen = {"num_reg_tokens": registers, "rope_temperature": model["rope_base"]}
        name = f"vit_small_{plus}patch16_dinov3{biased}"
    else:
        if gated:  # timm counts gate and value together
            hidden = int(model["embed_dim"] * model["mlp_ratio"])
            sizes["mlp_ratio"] = exact_ratio(2 * hidden, model["embed_dim"])
        reg = "" if model["class_position"] else "reg4_"
        name = f"vit_{'giant' if gated else 'small'}_patch14_{reg}dinov2"
        options = {"reg_tokens": 0 if model["class_position"] else 4, "init_values": 1e-5}
        if model["layer_scale"] is None and not gated:
            name = "vit_small_patch16_224"
            options = {"reg_tokens": 0, "init_values": None, "no_embed_class": False}
        options |= {"qkv_bias": True}
        chosen = {"reg_tokens": registers, "qkv_bias": model["qkv_bias"]}
        chosen |= {"no_embed_class": not model["class_position"]}
    chosen["init_values"] = options["init_values"] if model["layer_scale"] else None
    changed = {name: value for name, value in chosen.items() if value != options.get(name, value)}
    return name, sizes | changed


def _sizes(model: Mapping[str, Any]) -> tuple[int | float, ...]:
    return tuple(model[name] for name in ("patch_size", "embed_dim", "depth", "num_heads"))


def told_by_config(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What a timm `config.json` says beyond shapes: heads, eps, normalisation and licence.

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
            raise OtherArchitecture(
                f"{where}: image size {str(size)[:80]}: only square images are read"
            )
    if strange := sorted(set(arguments) - _READ_ARGUMENTS):
        raise OtherArchitecture(
            f"{where}: model_args {', '.join(strange)[:80]}: not of a plain ViT: {NOT_OURS}"
        )
    model = named_model(content.get("architecture"), where)
    said = {ours: arguments.get(theirs) for theirs, ours in _ARGUMENTS.items()}
    size = arguments.get("img_size") or pretrained.get("input_size") or model.patch_embed.img_size
    told["img_size"] = size if isinstance(size, int) else size[-1]
    told["family"] = timm_family(model)
    told |= {key: value for key, value in said.items() if value is not None}
    return told_by_model(model) | told


def timm_family(model: TimmModel) -> str | None:
    """The family of a model of timm, if its tensors do not give it."""
    return Family.DINOV3.value if isinstance(model, Eva) else None


def named_model(name: Any, where: str) -> TimmModel:
    """Build the named vision transformer of timm, which our trunk can compute, on the meta device.

    Raises:
        UserError: if timm has none of that name, or our trunk cannot compute it.
    """
    if not isinstance(name, str) or not timm.is_model(name):
        raise UserError(f"{where}: timm {timm.__version__} has no architecture {str(name)[:80]!r}")
    try:
        with torch.device("meta"):
            model = timm.create_model(name, pretrained=False)
    except Exception as error:  # timm's models raise anything where they have no storage
        raise UserError(f"{where}: timm cannot build architecture {name!r}") from error
    if (
        not isinstance(model, TimmVisionTransformer | Eva)
        or type(model.patch_embed) is not PatchEmbed
        or type(model.blocks[0]) not in (Block, EvaBlock)
        or (isinstance(model, Eva) and not _is_dinov3(model))
    ):
        raise OtherArchitecture(
            f"{where}: architecture {name!r} is not a plain vision transformer, nor one of DINOv2 "
            f"or DINOv3: {NOT_OURS}"
        )
    mlp = model.blocks[0].get_submodule("mlp")
    activation = mlp.get_submodule("act")
    gated = isinstance(mlp, GluMlp | SwiGLU) and isinstance(activation, nn.SiLU)
    exact = isinstance(activation, nn.GELU) and activation.approximate == "none"
    if not (gated or (exact and not isinstance(mlp, GluMlp | SwiGLU))):
        kind = type(activation).__name__
        raise OtherArchitecture(
            f"{where}: architecture {name!r} computes {kind}, not exact GELU: {NOT_OURS}"
        )
    return model


def _is_dinov3(model: Eva) -> bool:
    """Whether the model has the positions that `msn.method.positions.Rope` computes."""
    rope = model.rope
    return type(rope) is RotaryEmbeddingDinoV3 and bool(rope.rotate_half) and rope.grid_offset == 0


def told_by_model(model: TimmModel) -> dict[str, Any]:
    """What a model of timm says beyond shapes: heads, and eps and base if they differ from ours."""
    # To the type checker a number of heads may be a module, as any attribute may.
    heads = int(model.blocks[0].get_submodule("attn").num_heads)  # type: ignore[arg-type]
    eps = getattr(model.blocks[0].get_submodule("norm1"), "eps", LAYER_NORM_EPS)
    told = {"num_heads": heads} | ({} if eps == LAYER_NORM_EPS else {"layer_norm_eps": float(eps)})
    base = getattr(getattr(model, "rope", None), "temperature", PLAIN["rope_base"])
    if base != PLAIN["rope_base"]:
        told["rope_base"] = float(base)
    return told


def check_same_model(weights: Weights, model: TimmModel, where: str) -> None:
    """Refuse weights that are not those of the named model; the image size may differ.

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
    if heads != named and not wrong:
        wrong.append(f"it has {heads} attention heads instead of {named}")
    if wrong:
        raise UserError(f"{where}: the file is of another model: {summary(wrong)}")


def timm_twin(
    trunk: Mapping[str, Tensor], model: Mapping[str, Any], *, num_classes: int = 0, **changes: Any
) -> TimmModel:
    """timm's model of the same family with our weights, in eval mode.

    Args:
        trunk: state dict in timm's names.
        model: arguments of our `VisionTransformer`.
        num_classes: of a head, which keeps timm's initialisation; 0 for none.
        changes: further arguments of timm's model.
    """
    name, arguments = architecture(model)
    norm = partial(nn.LayerNorm, eps=model.get("layer_norm_eps", LAYER_NORM_EPS))
    arguments |= {"dynamic_img_size": False, "num_classes": num_classes, "global_pool": "token"}
    other: Any = timm.create_model(name, **arguments, norm_layer=norm, **changes)
    head = {f"head.{key}": value for key, value in other.head.state_dict().items()}
    other.load_state_dict({**head, **trunk}, strict=True)
    twin: TimmModel = other.eval()
    return twin
