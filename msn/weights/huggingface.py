"""Hugging Face's names, configurations and preprocessing files for `ViTMSNModel`, both ways.

The names are those of transformers 4, which transformers 5 reads and writes too.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from msn.errors import UserError
from msn.method.vit import LAYER_NORM_EPS
from msn.weights.preprocessing import short_side

# model_type -> what `Weights.source` calls it.
MODEL_TYPES = {
    "vit_msn": "huggingface",
    "vit_mae": "huggingface mae",
    "vit": "huggingface vit",
}

# (ours, theirs); `{}` is the number of the block.
_NAMES = (
    ("cls_token", "embeddings.cls_token"),
    ("pos_embed", "embeddings.position_embeddings"),
    ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
    ("blocks.{}.norm1", "encoder.layer.{}.layernorm_before"),
    ("blocks.{}.attn.proj", "encoder.layer.{}.attention.output.dense"),
    ("blocks.{}.norm2", "encoder.layer.{}.layernorm_after"),
    ("blocks.{}.mlp.fc1", "encoder.layer.{}.intermediate.dense"),
    ("blocks.{}.mlp.fc2", "encoder.layer.{}.output.dense"),
    ("norm", "layernorm"),
)
_QKV = ("query", "key", "value")
_QUERY, *_KEY_VALUE = [f"encoder.layer.{{}}.attention.attention.{part}" for part in _QKV]
_OURS_TO_THEIRS, _THEIRS_TO_OURS = dict(_NAMES), {theirs: ours for ours, theirs in _NAMES}


def is_huggingface(names: Mapping[str, Any]) -> bool:
    """Whether a state dict speaks Hugging Face's names."""
    key = "embeddings.patch_embeddings.projection.weight"
    return key in names or f"vit.{key}" in names


def from_huggingface(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Translate to timm's names.

    Args:
        tensors: state dict of a ViTMSN, ViTMAE or ViT model, with or without the `vit.` prefix.

    Returns:
        The trunk's state dict, and the names that are no part of it (classifier, decoder, ...).
    """
    bare = {name.removeprefix("vit."): tensor for name, tensor in tensors.items()}
    trunk, ignored = {}, []
    for name, tensor in bare.items():
        stem, suffix, number = _parse(name)
        if (ours := _THEIRS_TO_OURS.get(stem)) is not None:
            trunk[ours.format(number) + suffix] = tensor
        elif stem == _QUERY:
            parts = [name.replace(".query.", f".{part}.") for part in _QKV]
            if all(part in bare for part in parts):
                joined = torch.cat([bare[part] for part in parts])
                trunk[f"blocks.{number}.attn.qkv{suffix}"] = joined
        elif stem not in _KEY_VALUE:
            ignored.append(name)
    return trunk, tuple(ignored)


def to_huggingface(trunk: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translate a trunk's state dict to the names of `ViTMSNModel`."""
    tensors = {}
    for name, tensor in trunk.items():
        stem, suffix, number = _parse(name)
        if stem == "blocks.{}.attn.qkv":
            for part, chunk in zip(_QKV, tensor.chunk(3), strict=True):
                stem = _QUERY.replace("query", part)
                tensors[stem.format(number) + suffix] = chunk.clone()
        else:
            tensors[_OURS_TO_THEIRS[stem].format(number) + suffix] = tensor
    return tensors


def model_config(model: Mapping[str, int | float], classes: Sequence[str] | None) -> dict[str, Any]:
    """`config.json` of a `ViTMSNModel`, or with classes of a `ViTMSNForImageClassification`."""
    width = int(model["embed_dim"])
    config: dict[str, Any] = {
        "architectures": ["ViTMSNModel" if classes is None else "ViTMSNForImageClassification"],
        "attention_probs_dropout_prob": 0.0,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "hidden_size": width,
        "image_size": model["img_size"],
        "initializer_range": 0.02,
        "intermediate_size": int(width * model["mlp_ratio"]),
        "layer_norm_eps": LAYER_NORM_EPS,
        "model_type": "vit_msn",
        "num_attention_heads": model["num_heads"],
        "num_channels": 3,
        "num_hidden_layers": model["depth"],
        "patch_size": model["patch_size"],
        "qkv_bias": True,
    }
    if classes is not None:
        config["id2label"] = {str(index): name for index, name in enumerate(classes)}
        config["label2id"] = {name: index for index, name in enumerate(classes)}
    return config


def preprocessor_config(
    image_size: int, *, mean: Sequence[float], std: Sequence[float]
) -> dict[str, Any]:
    """`preprocessor_config.json`: shortest edge as `short_side` says, then a centre crop.

    Training scripts crop to `size`, so this must be the model's own. PoolFormerImageProcessor then
    resizes to size / crop_pct, at every size; ConvNextImageProcessor squashes from 384 px on,
    ViTImageProcessor always, and BitImageProcessor takes the size before the crop.
    """
    return {
        "image_processor_type": "PoolFormerImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": image_size},
        "crop_pct": _crop_pct(image_size),
        "resample": 2,  # bilinear, as the evaluation transform
        "do_center_crop": True,
        "crop_size": {"height": image_size, "width": image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }


def _crop_pct(image_size: int) -> float:
    """What `int(image_size / crop_pct)` makes `short_side(image_size)` of, never one short."""
    fraction = image_size / short_side(image_size)
    exact = int(image_size / fraction) == short_side(image_size)
    return fraction if exact else math.nextafter(fraction, 0)


def told_by_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What a `config.json` tells beyond shapes.

    Raises:
        UserError: if the model computes something that our trunk does not.
    """
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        allowed = ", ".join(MODEL_TYPES)
        raise UserError(f"{where}: model_type must be one of {allowed}, got {kind!r}")
    if config.get("hidden_act", "gelu") != "gelu":
        raise UserError(f"{where}: hidden_act must be gelu, got {config['hidden_act']!r}")
    # transformers leaves numbers out that have their default.
    return {"num_heads": config.get("num_attention_heads", 12)}


def _parse(name: str) -> tuple[str, str, str]:
    """'blocks.3.norm1.weight' -> ('blocks.{}.norm1', '.weight', '3')."""
    stem, dot, kind = name.rpartition(".")
    if kind not in ("weight", "bias"):
        return name, "", ""
    number = re.search(r"\.(\d+)\.", stem)
    if number is None:
        return stem, dot + kind, ""
    return stem.replace(number[0], ".{}.", 1), dot + kind, number[1]
