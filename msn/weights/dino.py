"""Translate DINOv2, DINOv3 and EUPE from facebookresearch's and Hugging Face's names to timm's.

The trunk has the names of timm's `vit_..._dinov2` and `vit_..._dinov3`.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from msn.errors import UserError
from msn.method.vit import LAYER_NORM_EPS, PLAIN
from msn.weights.weights import Family, family_of

DINOV3_LICENCE = "DINOv3 License"
EUPE_LICENCE = "FAIR Research License"
# `model_type` of Hugging Face -> what `Weights.source` calls it.
MODEL_TYPES = {
    "dinov2": "huggingface dinov2",
    "dinov2_with_registers": "huggingface dinov2",
    "dinov3_vit": "huggingface dinov3",
}
_PUBLISHED = {"facebook/dinov2-": "apache-2.0", "facebook/dinov3-": DINOV3_LICENCE}
V3_EPS = 1e-5

_CHUNK = re.compile(r"^blocks\.\d+\.(\d+)\.")
_FB_V2 = {
    r"^register_tokens$": "reg_token",
    r"\.mlp\.w12\.": ".mlp.fc1.",
    r"\.mlp\.w3\.": ".mlp.fc2.",
}
_FB_V3 = {
    r"^storage_tokens$": "reg_token",
    r"\.ls(\d)\.gamma$": r".gamma_\1",
    r"\.mlp\.w1\.": ".mlp.fc1_g.",
    r"\.mlp\.w2\.": ".mlp.fc1_x.",
    r"\.mlp\.w3\.": ".mlp.fc2.",
}
# Not part of the trunk: used only in pretraining, or computed.
_ASIDE = re.compile(
    r"^(embeddings\.)?mask_token$|^rope_embed\.|\.bias_mask$|^(projectors|local_cls_norm|classifier|head|dino_head|"
    r"ibot_head)\b"
)
_HF = {
    r"^embeddings\.cls_token$": "cls_token",
    r"^embeddings\.register_tokens$": "reg_token",
    r"^embeddings\.position_embeddings$": "pos_embed",
    r"^embeddings\.patch_embeddings\.(projection\.)?": "patch_embed.proj.",
    r"^(model\.|encoder\.)?layer\.": "blocks.",
    r"\.attention\.output\.dense\.|\.attention\.o_proj\.": ".attn.proj.",
    r"\.attention\.attention\.query\.|\.attention\.q_proj\.": ".attn.q.",
    r"\.attention\.attention\.key\.|\.attention\.k_proj\.": ".attn.k.",
    r"\.attention\.attention\.value\.|\.attention\.v_proj\.": ".attn.v.",
    r"\.mlp\.weights_in\.": ".mlp.fc1.",
    r"\.mlp\.(weights_out|down_proj)\.": ".mlp.fc2.",
    r"^layernorm\.": "norm.",
}
_HF_V2 = _HF | {r"\.layer_scale(\d)\.lambda1$": r".ls\1.gamma"}
_HF_V3 = _HF | {r"\.layer_scale(\d)\.lambda1$": r".gamma_\1", r"\.mlp\.gate_proj\.": ".mlp.fc1_g."}


class Translated(NamedTuple):
    """A trunk of the family in timm's names."""

    trunk: dict[str, Tensor]
    source: str
    """As `Weights.source` has it."""
    ignored: tuple[str, ...]
    meta: dict[str, Any]


def translate(tensors: Mapping[str, Tensor], where: str) -> Translated | None:
    """Translate a state dict in a layout of the publishers or of Hugging Face; None for any other.

    Args:
        tensors: without wrappers and prefixes.
        where: the path, for messages.

    Raises:
        UserError: if keys have a bias, which rotary positions would rotate.
    """
    names = list(tensors)
    if "embeddings.patch_embeddings.weight" in tensors:
        return _huggingface(tensors, where, rotary=True)
    if any(name.endswith(".layer_scale1.lambda1") for name in names):
        return _huggingface(tensors, where, rotary=False)
    if "storage_tokens" in tensors or any(name.startswith("rope_embed.") for name in names):
        return _facebook_v3(tensors, where)
    signs = ("register_tokens", "blocks.0.mlp.w12.weight")
    if any(_CHUNK.match(name) for name in names) or any(sign in tensors for sign in signs):
        trunk, ignored = _renamed(tensors, _FB_V2)
        return Translated(_without_class_position(trunk), "dinov2", ignored, {})
    return None


def _facebook_v3(tensors: Mapping[str, Tensor], where: str) -> Translated:
    trunk, ignored = _renamed(tensors, _FB_V3)
    _check_periods(tensors.get("rope_embed.periods"), where)
    masks = {_CHUNK.sub(r"blocks.\1.", name): t for name, t in tensors.items()}
    for name in [name for name in trunk if name.endswith(".attn.qkv.bias")]:
        mask = masks.get(f"{name}_mask")
        query, key, value = (trunk.pop(name) if mask is None else trunk.pop(name) * mask).chunk(3)
        _check_key_bias(key, where)
        stem = name.removesuffix("qkv.bias")
        trunk |= {f"{stem}q_bias": query.clone(), f"{stem}v_bias": value.clone()}
    eupe = any(name.startswith("projectors.") for name in tensors)
    licence = EUPE_LICENCE if eupe else DINOV3_LICENCE
    return Translated(trunk, "dinov3", ignored, {"licence": licence})


def _huggingface(tensors: Mapping[str, Tensor], where: str, *, rotary: bool) -> Translated:
    trunk, ignored = _renamed(tensors, _HF_V3 if rotary else _HF_V2)
    for stem in [
        name.removesuffix("q.weight") for name in trunk if name.endswith(".attn.q.weight")
    ]:
        for kind in ("weight", "bias"):
            parts = [trunk.pop(f"{stem}{part}.{kind}", None) for part in "qkv"]
            if rotary and kind == "bias":
                query, key, value = parts
                _check_key_bias(key, where)
                both = {f"{stem}q_bias": query, f"{stem}v_bias": value}
                trunk |= {name: part for name, part in both.items() if part is not None}
            elif any(part is not None for part in parts):
                # Parts that are missing or do not belong together are named by their shapes later.
                trunk[f"{stem}qkv.{kind}"] = torch.cat([p for p in parts if p is not None])
    for name in [name for name in trunk if ".mlp.up_proj." in name]:
        gate = name.replace("up_proj", "gate_proj")
        gated = gate.replace("gate_proj", "fc1_g") in trunk
        if gate in trunk:  # DINOv2's, as transformers 5 has it in memory
            trunk[name.replace("up_proj", "fc1")] = torch.cat([trunk.pop(gate), trunk.pop(name)])
        else:
            trunk[name.replace("up_proj", "fc1_x" if gated else "fc1")] = trunk.pop(name)
    if not rotary:
        trunk = _without_class_position(trunk)
    return Translated(trunk, f"huggingface {'dinov3' if rotary else 'dinov2'}", ignored, {})


def _renamed(
    tensors: Mapping[str, Tensor], table: Mapping[str, str]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    trunk = {}
    ignored = tuple(name for name in tensors if _ASIDE.search(name))
    for name, tensor in tensors.items():
        if name not in ignored:
            new = _CHUNK.sub(r"blocks.\1.", name)
            for pattern, ours in table.items():
                new = re.sub(pattern, ours, new)
            trunk[new] = tensor
    return trunk, ignored


def _without_class_position(trunk: dict[str, Tensor]) -> dict[str, Tensor]:
    """With registers, add the constant position of the class token to the token, as timm does."""
    places = trunk.get("pos_embed")
    if "reg_token" in trunk and places is not None and places.ndim == 3 and "cls_token" in trunk:
        trunk["cls_token"] = trunk["cls_token"] + places[:, :1]
        trunk["pos_embed"] = places[:, 1:].clone()
    return trunk


def _check_key_bias(key: Tensor | None, where: str) -> None:
    if key is not None and bool(key.nan_to_num().any()):
        raise UserError(f"{where}: keys have a bias beside rotary positions; DINOv3's have none")


def _check_periods(periods: Tensor | None, where: str) -> None:
    """Refuse periods of another base than DINOv3's; those that bfloat16 rounded are its own."""
    if periods is None:
        return
    count = periods.numel()
    expected = PLAIN["rope_base"] ** (torch.arange(count, dtype=torch.float64) / count)
    if not torch.allclose(periods.double().flatten(), expected, rtol=1e-2):
        raise UserError(f"{where}: rope_embed.periods are not those of base 100, which we read")


def told_by_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What a `config.json` of Hugging Face says beyond shapes.

    Raises:
        UserError: if the model computes something that our trunk does not.
    """
    kind = str(config["model_type"])
    rotary = kind == "dinov3_vit"
    wanted: dict[str, Any] = {"hidden_act": "gelu"}
    if rotary:
        wanted |= {"proj_bias": True, "mlp_bias": True}
        # The official code's names; transformers would not read them either.
        wanted |= {f"pos_embed_rope_{bound}_period": None for bound in ("min", "max")}
        wanted["pos_embed_rope_normalize_coords"] = "separate"
        if config.get("query_bias", True) != config.get("value_bias", True):
            raise UserError(f"{where}: query_bias and value_bias must be alike")
        if config.get("use_gated_mlp"):
            wanted["hidden_act"] = "silu"
    for name, value in wanted.items():
        found = config.get(name, value if name != "hidden_act" else "gelu")
        if found != value:
            raise UserError(f"{where}: {name} must be {value}, got {str(found)[:80]!r}")
    size = config.get("image_size", 224)
    if isinstance(size, list) and len(set(map(str, size))) > 1:
        raise UserError(f"{where}: image_size {str(size)[:80]}: only square images are read")
    told: dict[str, Any] = {
        "family": "dinov3" if rotary else "dinov2",
        "num_heads": config.get("num_attention_heads", 6 if rotary else 12),
        "layer_norm_eps": config.get("layer_norm_eps", V3_EPS if rotary else LAYER_NORM_EPS),
    }
    if rotary:
        told["img_size"] = size[0] if isinstance(size, list) else size
        told["rope_base"] = config.get("rope_theta", PLAIN["rope_base"])
    for name, licence in _PUBLISHED.items():
        if str(config.get("_name_or_path", "")).startswith(name):
            told["licence"] = licence
    return told


def to_huggingface(trunk: Mapping[str, Tensor], model: Mapping[str, Any]) -> dict[str, Tensor]:
    """Translate a trunk's state dict to the names that transformers writes for the family."""
    rotary = family_of(model) is Family.DINOV3
    table = _TO_V3 if rotary else _TO_V2 | (_GATED_V2 if model.get("mlp") == "swiglu" else {})
    tensors: dict[str, Tensor] = {}
    for name, tensor in trunk.items():
        new = name
        for pattern, theirs in table.items():
            new = re.sub(pattern, theirs, new)
        if ".attn.qkv." in new:
            for part, chunk in zip(_QKV, tensor.chunk(3), strict=True):
                theirs = f"attention.{part[0]}_proj" if rotary else f"attention.attention.{part}"
                tensors[new.replace("attn.qkv", theirs)] = chunk.clone()
        else:
            tensors[new] = tensor
    width = trunk["cls_token"].shape[-1]
    if "reg_token" in trunk and not rotary:
        places = tensors["embeddings.position_embeddings"]
        tensors["embeddings.position_embeddings"] = torch.cat(
            [torch.zeros_like(places[:, :1]), places], dim=1
        )
    if rotary or "reg_token" in trunk:  # these models always have one
        shape = (1, 1, width) if rotary else (1, width)
        tensors["embeddings.mask_token"] = torch.zeros(shape)
    return tensors


_TO_HF = {
    r"^(cls_token)$": r"embeddings.\1",
    r"^reg_token$": "embeddings.register_tokens",
    r"^pos_embed$": "embeddings.position_embeddings",
}
_TO_V2 = _TO_HF | {
    r"^patch_embed\.proj\.": "embeddings.patch_embeddings.projection.",
    r"^norm\.": "layernorm.",
    r"^blocks\.": "encoder.layer.",
    r"\.attn\.proj\.": ".attention.output.dense.",
    r"\.ls(\d)\.gamma$": r".layer_scale\1.lambda1",
}
_TO_V3 = _TO_HF | {
    r"^patch_embed\.proj\.": "embeddings.patch_embeddings.",
    r"^blocks\.": "layer.",
    r"\.attn\.proj\.": ".attention.o_proj.",
    r"\.attn\.([qv])_bias$": r".attention.\1_proj.bias",
    r"\.gamma_(\d)$": r".layer_scale\1.lambda1",
    r"\.mlp\.fc1_g\.": ".mlp.gate_proj.",
    r"\.mlp\.fc1(_x)?\.": ".mlp.up_proj.",
    r"\.mlp\.fc2\.": ".mlp.down_proj.",
}
_GATED_V2 = {r"\.mlp\.fc1\.": ".mlp.weights_in.", r"\.mlp\.fc2\.": ".mlp.weights_out."}
_QKV = ("query", "key", "value")


def model_config(model: Mapping[str, Any], classes: Sequence[str] | None) -> dict[str, Any]:
    """`config.json` of the family's model of transformers, with the classes of its classifier.

    Raises:
        UserError: if transformers has no model with these options.
    """
    model = {**PLAIN, **model}
    rotary, registers = family_of(model) is Family.DINOV3, model["registers"]
    width, gated = int(model["embed_dim"]), model["mlp"] == "swiglu"
    config: dict[str, Any] = {
        "hidden_act": "gelu",
        "hidden_size": width,
        "image_size": model["img_size"],
        "layer_norm_eps": model["layer_norm_eps"],
        "layerscale_value": model["layer_scale"],
        "num_attention_heads": model["num_heads"],
        "num_channels": 3,
        "num_hidden_layers": model["depth"],
        "patch_size": model["patch_size"],
    }
    if model["layer_scale"] is None:
        raise UserError(
            "format=huggingface: only transformers' ViT can have model.layer_scale=null"
        )
    if rotary:
        if classes is not None:
            raise UserError("head: transformers has no classifier for DINOv3")
        config |= {
            "architectures": ["DINOv3ViTModel"],
            "model_type": "dinov3_vit",
            "intermediate_size": int(width * model["mlp_ratio"]),
            "use_gated_mlp": gated,
            "num_register_tokens": registers,
            "query_bias": model["qkv_bias"],
            "key_bias": False,
            "value_bias": model["qkv_bias"],
            "rope_theta": model["rope_base"],
        }
        if gated:
            config["hidden_act"] = "silu"
        return config
    if registers == 0 and not model["class_position"]:
        raise UserError("format=huggingface: model.class_position=false needs model.registers")
    name = "Dinov2WithRegisters" if registers else "Dinov2"
    config |= {
        "architectures": [f"{name}Model" if classes is None else f"{name}ForImageClassification"],
        "model_type": "dinov2_with_registers" if registers else "dinov2",
        "mlp_ratio": _whole_ratio(model, gated),
        "use_swiglu_ffn": gated,
        "qkv_bias": model["qkv_bias"],
    }
    config |= {"num_register_tokens": registers} if registers else {"use_mask_token": False}
    return config | ({} if classes is None else labels(classes))


def labels(classes: Sequence[str]) -> dict[str, Any]:
    """The entries of `config.json` that name a classifier's classes."""
    return {
        "id2label": {str(index): name for index, name in enumerate(classes)},
        "label2id": {name: index for index, name in enumerate(classes)},
    }


def _whole_ratio(model: Mapping[str, Any], gated: bool) -> int:
    """The `mlp_ratio` there: SwiGLU takes two thirds of it, rounded up to a multiple of 8."""
    width, hidden = int(model["embed_dim"]), int(model["embed_dim"] * model["mlp_ratio"])
    for ratio in range(1, 65):
        theirs = (int(width * ratio * 2 / 3) + 7) // 8 * 8 if gated else width * ratio
        if theirs == hidden:
            return ratio
    raise UserError(
        f"format=huggingface: DINOv2's configuration cannot express mlp_ratio={model['mlp_ratio']}"
    )
