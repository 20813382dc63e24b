"""What a weight file holds, in one language: timm's names, whatever file it came from."""

import hashlib
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from msn.errors import UserError
from msn.method.vit import VisionTransformer

log = logging.getLogger(__name__)

# Of the header that travels with weights we write.
FORMAT = 1
BACKBONE_FILE = "backbone.safetensors"

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# The files that facebookresearch/msn published, and what descends from them, keep this licence.
PUBLISHED_LICENCE = "CC BY-NC 4.0"
SCRATCH_LICENCE = "not stated (trained from scratch: its owner decides)"
UNKNOWN_LICENCE = "unknown (that of the weights' source)"

# Names in a low-shot table that stand for no backbone of a person.
BASELINES = ("random", "pixels")

MAX_DIFFERENCES = 10
# Width of an attention head in nearly all vision transformers.
_USUAL_HEAD = 64

# From these tensors (and how many axes they have) the sizes of a vision transformer are read off.
_SIZED_BY = {
    "cls_token": 3,
    "pos_embed": 3,
    "patch_embed.proj.weight": 4,
    "blocks.0.mlp.fc1.weight": 2,
}
_OURS = ("cls_token", "pos_embed", "patch_embed.proj.", "blocks.", "norm.")


@dataclass(frozen=True)
class Weights:
    """Weights read from any supported file, in the names of `msn.method`."""

    trunk: dict[str, Tensor]
    """State dict of the (target) `VisionTransformer`, at least float32."""
    model: dict[str, int | float]
    """The six numbers of `VisionTransformer`."""
    source: str
    """The kind of file, e.g. "msn checkpoint", "huggingface mae"."""
    head: dict[str, Tensor] | None = None
    """State dict of the target's `ProjectionHead`."""
    prototypes: Tensor | None = None
    """[K, P]."""
    anchor_trunk: dict[str, Tensor] | None = None
    anchor_head: dict[str, Tensor] | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    """epoch, data, method, licence, init, mean, std as far as the file says."""
    ignored: tuple[str, ...] = ()
    """Names in the file that have no place in the network."""
    heads_assumed: bool = False
    """True where neither file nor caller told `num_heads`: it is then width // 64."""


def infer_model(
    trunk: Mapping[str, Tensor], told: Mapping[str, Any], num_heads: int | None, where: str
) -> tuple[dict[str, int | float], bool]:
    """The six numbers of the `VisionTransformer` that a state dict belongs to.

    Args:
        trunk: state dict in timm's names.
        told: what the file itself says, any of the six numbers; shapes win except for `num_heads`.
        num_heads: the caller's word where the file has none; where it has one, that wins.
        where: the path, for messages.

    Returns:
        The numbers, and whether `num_heads` had to be assumed.

    Raises:
        UserError: if this is no vision transformer.
    """
    _check_known_layout(trunk, where)
    patch, hidden = trunk["patch_embed.proj.weight"], trunk["blocks.0.mlp.fc1.weight"]
    width, patch_size = patch.shape[0], patch.shape[-1]
    side = math.isqrt(trunk["pos_embed"].shape[1] - 1)
    heads = told.get("num_heads", num_heads)
    model = {
        "img_size": side * patch_size,
        "patch_size": patch_size,
        "embed_dim": width,
        "depth": len({found[1] for name in trunk if (found := re.match(r"blocks\.(\d+)\.", name))}),
        "num_heads": guessed_heads(width) or 1 if heads is None else heads,
        "mlp_ratio": _mlp_ratio(hidden.shape[0], width),
    }
    return model, heads is None


def guessed_heads(width: int) -> int | None:
    """Heads that most vision transformers of a width have; None where a guess is worthless."""
    return None if width % _USUAL_HEAD else width // _USUAL_HEAD


def say_assumed_heads(weights: Weights, where: str) -> None:
    """Warn where the number of heads is a guess: another one gives other features, not an error."""
    if weights.heads_assumed:
        log.warning(
            "%s does not tell its number of attention heads: %d assumed (width // 64); "
            "model.num_heads overrides",
            where,
            weights.model["num_heads"],
        )


def trunk_digest(trunk: Mapping[str, Tensor]) -> str:
    """Digest of a state dict with its names: other weights, another digest."""
    digest = hashlib.sha256()
    for name, tensor in sorted(trunk.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\0".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_channels(value: Any, where: str) -> None:
    """Raise a UserError unless a value is three numbers, as mean and std of colours are."""
    numbers = isinstance(value, list | tuple) and all(
        isinstance(part, int | float) and math.isfinite(part) for part in value
    )
    if not numbers or len(value) != 3:
        raise UserError(f"{where}: must be three numbers, got {str(value)[:80]}")


def check_trunk(trunk: Mapping[str, Tensor], model: Mapping[str, int | float], where: str) -> None:
    """Refuse a state dict that is not exactly one of the `VisionTransformer` of these numbers.

    Raises:
        UserError: naming at most ten differing keys and shapes.
    """
    with torch.device("meta"):
        expected = VisionTransformer(**model).state_dict()  # type: ignore[arg-type]
    found = differences(trunk, expected)
    if found:
        raise UserError(f"{where}: another architecture: {summary(found)}")


def differences(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """Keys and shapes in which two state dicts differ, as short phrases."""
    phrases = [f"{name} is missing" for name in expected if name not in found]
    for name, tensor in found.items():
        if name not in expected:
            phrases.append(f"{name} {list(tensor.shape)} is not expected")
        elif tensor.shape != expected[name].shape:
            want = list(expected[name].shape)
            phrases.append(f"{name} is {list(tensor.shape)} instead of {want}")
    return phrases


def summary(phrases: list[str]) -> str:
    """At most ten of the phrases in one line."""
    more = len(phrases) - MAX_DIFFERENCES
    tail = f"; and {more} more" if more > 0 else ""
    return "; ".join(phrases[:MAX_DIFFERENCES]) + tail


def build_trunk(weights: Weights) -> VisionTransformer:
    """The `VisionTransformer` of some weights, loaded strictly, in eval mode.

    float32, or float64 where the weights are.
    """
    trunk = VisionTransformer(**weights.model)  # type: ignore[arg-type]
    trunk.to(weights.trunk["cls_token"].dtype)
    trunk.load_state_dict(weights.trunk, strict=True)
    return trunk.eval()


def strip_prefix(tensors: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The entries whose names start with a prefix, without it."""
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def widen(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors with half types as float32, which holds them exactly."""
    return {
        name: t.float() if t.is_floating_point() and t.itemsize < 4 else t
        for name, t in tensors.items()
    }


def _mlp_ratio(hidden: int, width: int) -> int | float:
    if hidden % width == 0:
        return hidden // width
    ratio = hidden / width
    # timm takes int(width * ratio), which must not fall one short by rounding.
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _check_known_layout(trunk: Mapping[str, Tensor], where: str) -> None:
    """Refuse what is so unlike a vision transformer that its sizes cannot be read off."""
    wrong = []
    for name, dims in _SIZED_BY.items():
        if name not in trunk:
            wrong.append(f"{name} is missing")
        elif trunk[name].ndim != dims or 0 in trunk[name].shape:
            wrong.append(f"{name} is {list(trunk[name].shape)}, not {dims} axes")
    if wrong:
        wrong += [
            f"{name} {list(tensor.shape)} is not expected"
            for name, tensor in trunk.items()
            if not name.startswith(_OURS)
        ]
        raise UserError(f"{where}: another architecture: {summary(wrong)}")
