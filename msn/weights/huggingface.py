"""Read and write Hugging Face's names, config.json and preprocessing of ViTMSN, ViTMAE and ViT.

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
from msn.weights import dino
from msn.weights.architecture import NOT_OURS, OtherArchitecture
from msn.weights.weights import (
    PUBLISHED_LICENCE,
    Family,
    Weights,
    check_channels,
    check_number,
    family_of,
    short_side,
    strip_prefix,
)

# model_type -> what `Weights.source` calls it.
MODEL_TYPES = {"vit_msn": "huggingface", "vit_mae": "huggingface mae", "vit": "huggingface vit"}
_CLASSES = {"vit_msn": "ViTMSN", "vit_mae": "ViTMAE", "vit": "ViT"}
# Where the paper's published files are on the Hub.
_PUBLISHED = "facebook/vit-msn-"

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
# What transformers 5 calls the parts of a block in memory; it writes the older names.
_NEWER = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
    "layernorm_before": "layernorm_before",
    "layernorm_after": "layernorm_after",
}
# Classifiers, poolers, decoders and what only pretraining uses.
_NOT_TRUNK = ("classifier.", "pooler.", "decoder.", "embeddings.mask_token")
_QKV = ("query", "key", "value")
_QUERY, *_KEY_VALUE = [f"encoder.layer.{{}}.attention.attention.{part}" for part in _QKV]
_OURS_TO_THEIRS, _THEIRS_TO_OURS = dict(_NAMES), {theirs: ours for ours, theirs in _NAMES}


def is_huggingface(names: Mapping[str, Any]) -> bool:
    """Whether a state dict has Hugging Face's names."""
    key = "embeddings.patch_embeddings.projection.weight"
    return key in names or f"vit.{key}" in names


def from_huggingface(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Translate to timm's names.

    Args:
        tensors: state dict of a ViTMSN, ViTMAE or ViT model, with or without the `vit.` prefix.

    Returns:
        The trunk's state dict, and the names that are not part of it (classifier, decoder, ...).
    """
    bare = {_older(name.removeprefix("vit.")): tensor for name, tensor in tensors.items()}
    trunk, ignored = {}, []
    for name, tensor in bare.items():
        stem, suffix, number = _parse(name)
        if (ours := _THEIRS_TO_OURS.get(stem)) is not None:
            trunk[ours.format(number) + suffix] = tensor
        elif stem == _QUERY or stem in _KEY_VALUE:
            parts = [name.replace(f".{stem.rpartition('.')[2]}.", f".{part}.") for part in _QKV]
            found = [bare[part] for part in parts if part in bare]
            # Parts that do not belong together keep their names, to be reported as unknown.
            if len(found) == 3 and all(part.shape == tensor.shape != () for part in found):
                if stem == _QUERY:
                    trunk[f"blocks.{number}.attn.qkv{suffix}"] = torch.cat(found)
            else:
                trunk[name] = tensor
        elif name.startswith(_NOT_TRUNK):
            ignored.append(name)
        else:
            trunk[name] = tensor
    return trunk, tuple(ignored)


def _older(name: str) -> str:
    """From a name of transformers 5 in memory to that of transformers 4."""
    for new, old in _NEWER.items():
        name = re.sub(rf"^layers\.(\d+)\.{new}\.", rf"encoder.layer.\1.{old}.", name)
    return name


def decoder_from_huggingface(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The decoder of a `ViTMAEForPreTraining` in the names of `msn.method.mae.Decoder`."""
    layers, rest = {}, {}
    for name, tensor in strip_prefix(tensors, "decoder.").items():
        # Names of blocks: as transformers 5 writes them, as 4 does, and as 5 has them in memory.
        name = name.replace("decoder_encoder.layer.", "encoder.layer.")
        name = _older(name.replace("decoder_layers.", "layers."))
        if name.startswith(("layers.", "encoder.layer.")):
            layers[name.replace("layers.", "encoder.layer.")] = tensor
        else:
            rest[name.removeprefix("decoder_")] = tensor
    return from_huggingface(layers)[0] | rest


def decoder_to_huggingface(decoder: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `decoder_from_huggingface`, in the names of transformers 4."""
    blocks = {name: tensor for name, tensor in decoder.items() if name.startswith("blocks.")}
    layers = strip_prefix(to_huggingface(blocks), "encoder.layer.")
    rest = {
        name if name == "mask_token" else f"decoder_{name}": tensor
        for name, tensor in decoder.items()
        if name not in blocks
    }
    named = rest | {f"decoder_layers.{name}": tensor for name, tensor in layers.items()}
    return {f"decoder.{name}": tensor for name, tensor in named.items()}


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


def choose_model_type(weights: Weights, format: str, wanted: str | None, *, has_head: bool) -> str:
    """The `model_type` of an export, see `msn.weights.export.export`.

    Raises:
        UserError: if the wanted one does not exist or does not fit.
    """
    if wanted is not None and format != "huggingface":
        raise UserError(f"model_type needs format=huggingface, got format={format}")
    plain = family_of(weights.model) is Family.VIT
    if wanted is not None and not plain:
        raise UserError(f"model_type={wanted}: the weights are of another family of transformers")
    if wanted not in (None, *MODEL_TYPES):
        allowed = ", ".join(MODEL_TYPES)
        raise UserError(f"model_type must be one of {allowed}, or null, got {wanted!r}")
    if wanted == "vit_mae" and weights.decoder is None:
        raise UserError(
            "model_type=vit_mae: the weights hold no decoder; model_type=vit writes the encoder "
            "alone"
        )
    if wanted == "vit_mae" and has_head:
        raise UserError("model_type=vit_mae has no classifier: leave head out, or model_type=vit")
    if wanted is not None:
        return wanted
    if weights.meta.get("kind") != "mae" or format != "huggingface" or not plain:
        return "vit_msn"
    return "vit_mae" if weights.decoder is not None and not has_head else "vit"


def model_config(
    model: Mapping[str, int | float],
    classes: Sequence[str] | None,
    *,
    model_type: str = "vit_msn",
    mae: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """`config.json` of a model of transformers.

    Args:
        model: the numbers of `VisionTransformer`.
        classes: of a `...ForImageClassification`; None is the bare model.
        model_type: one of `MODEL_TYPES`.
        mae: of a `ViTMAEForPreTraining` the settings of `MAE`.
    """
    width = int(model["embed_dim"])
    name = _CLASSES[model_type]
    kind = "Model" if classes is None else "ForImageClassification"
    config: dict[str, Any] = {
        "architectures": [name + (kind if mae is None else "ForPreTraining")],
        "attention_probs_dropout_prob": 0.0,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "hidden_size": width,
        "image_size": model["img_size"],
        "initializer_range": 0.02,
        "intermediate_size": int(width * model["mlp_ratio"]),
        "layer_norm_eps": model.get("layer_norm_eps", LAYER_NORM_EPS),
        "model_type": model_type,
        "num_attention_heads": model["num_heads"],
        "num_channels": 3,
        "num_hidden_layers": model["depth"],
        "patch_size": model["patch_size"],
        "qkv_bias": True,
    }
    if classes is not None:
        config |= dino.labels(classes)
    if mae is not None:
        decoder = mae["decoder"]
        config |= {
            "decoder_hidden_size": decoder["embed_dim"],
            "decoder_intermediate_size": 4 * decoder["embed_dim"],
            "decoder_num_attention_heads": decoder["num_heads"],
            "decoder_num_hidden_layers": decoder["depth"],
            "mask_ratio": mae["mask_ratio"],
            "norm_pix_loss": mae["norm_pix_loss"],
        }
    return config


def mae_preprocessor_config(
    image_size: int, *, mean: Sequence[float], std: Sequence[float]
) -> dict[str, Any]:
    """For `ViTImageProcessor`, which ViTMAE's scripts use; it squashes images to a square."""
    config = preprocessor_config(image_size, mean=mean, std=std)
    for key in ("crop_pct", "do_center_crop", "crop_size"):
        del config[key]
    size = {"height": image_size, "width": image_size}
    return config | {"image_processor_type": "ViTImageProcessor", "size": size}


def preprocessor_config(
    image_size: int, *, mean: Sequence[float], std: Sequence[float]
) -> dict[str, Any]:
    """`preprocessor_config.json`: shortest edge as `short_side` says, then a centre crop.

    Training scripts crop to `size`, so this must be the model's own size. PoolFormerImageProcessor
    resizes to size / crop_pct at every size. ConvNextImageProcessor squashes from 384 px on,
    ViTImageProcessor always, and BitImageProcessor's `size` is the one before the crop.
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
    """A fraction for which `int(image_size / fraction)` is exactly `short_side(image_size)`."""
    fraction = image_size / short_side(image_size)
    exact = int(image_size / fraction) == short_side(image_size)
    return fraction if exact else math.nextafter(fraction, 0)


def told_by_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What a `config.json` says beyond shapes: heads, eps and, by its origin, the licence.

    Raises:
        UserError: if the model computes something that our trunk does not.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in MODEL_TYPES | dino.MODEL_TYPES:
        allowed = ", ".join(MODEL_TYPES | dino.MODEL_TYPES)
        what = f"{str(kind)[:80]!r}: {NOT_OURS}" if isinstance(kind, str) else str(kind)[:80]
        kinds = OtherArchitecture if isinstance(kind, str) else UserError
        raise kinds(f"{where}: model_type must be one of {allowed}, got {what}")
    if kind in dino.MODEL_TYPES:
        return dino.told_by_config(config, where) | _told_by_us(config)
    if config.get("hidden_act", "gelu") != "gelu":
        raise OtherArchitecture(
            f"{where}: hidden_act must be gelu, got {str(config['hidden_act'])[:80]!r}: {NOT_OURS}"
        )
    size = config.get("image_size")
    if isinstance(size, list) and len(set(map(str, size))) > 1:
        raise OtherArchitecture(
            f"{where}: image_size {str(size)[:80]}: only square images are read"
        )
    # transformers leaves out numbers that have their default.
    eps = LAYER_NORM_EPS if kind == "vit_msn" else 1e-12
    told = {
        "family": "vit",
        "num_heads": config.get("num_attention_heads", 12),
        "layer_norm_eps": config.get("layer_norm_eps", eps),
    }
    if str(config.get("_name_or_path", "")).startswith(_PUBLISHED):
        told["licence"] = PUBLISHED_LICENCE
    told |= _told_by_us(config)
    return told if kind != "vit_mae" else told | _told_of_mae(config)


def _told_by_us(config: Mapping[str, Any]) -> dict[str, str]:
    """The licence that our export states, and a link to its text."""
    own = config.get("msn")
    if not isinstance(own, dict) or not isinstance(own.get("licence"), str):
        return {}
    return {key: own[key] for key in ("licence", "licence_link") if isinstance(own.get(key), str)}


def _told_of_mae(config: Mapping[str, Any]) -> dict[str, Any]:
    """Decoder and loss of a ViTMAE configuration, as arguments of `msn.method.mae.MAE`.

    The shapes give the decoder's MLP; they must be those of our `Decoder`.
    """
    decoder = {
        "embed_dim": config.get("decoder_hidden_size", 512),
        "depth": config.get("decoder_num_hidden_layers", 8),
        "num_heads": config.get("decoder_num_attention_heads", 16),
    }
    method = {
        "decoder": decoder,
        "mask_ratio": config.get("mask_ratio", 0.75),
        "norm_pix_loss": config.get("norm_pix_loss", False),
    }
    return {"kind": "mae", "method": method}


def told_by_preprocessor(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """mean and std for pixels in [0, 1] by a `preprocessor_config.json`; empty if it has none.

    Raises:
        UserError: if they are not numbers.
    """
    scale = 255.0
    if content.get("do_rescale", True):
        scale *= check_number(content.get("rescale_factor", 1 / 255), f"{where}: rescale_factor")
    mean, std = [0.0] * 3, [1.0] * 3
    if content.get("do_normalize", True):
        if not {"image_mean", "image_std"} <= content.keys():
            return {}
        mean, std = content["image_mean"], content["image_std"]
        check_channels(mean, f"{where}: image_mean")
        check_channels(std, f"{where}: image_std", positive=True)
    if abs(scale - 1) > 1e-6:
        mean, std = [part / scale for part in mean], [part / scale for part in std]
    return {"mean": mean, "std": std}


def _parse(name: str) -> tuple[str, str, str]:
    """'blocks.3.norm1.weight' -> ('blocks.{}.norm1', '.weight', '3')."""
    stem, dot, kind = name.rpartition(".")
    if kind not in ("weight", "bias"):
        return name, "", ""
    number = re.search(r"\.(\d+)\.", stem)
    if number is None:
        return stem, dot + kind, ""
    return stem.replace(number[0], ".{}.", 1), dot + kind, number[1]
