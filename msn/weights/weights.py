"""`Weights`, what a file of any origin holds under timm's names, and checks of its tensors."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from msn.errors import UserError
from msn.method.network import ProjectionHead
from msn.method.positions import resize_position_embeddings
from msn.method.vit import VisionTransformer
from msn.weights.families import PAPER, Native

log = logging.getLogger(__name__)

# Version of the header in the weights that we write.
FORMAT = 1
BACKBONE_FILE = "backbone.safetensors"

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# The files that facebookresearch/msn published, and what descends from them, keep this licence.
PUBLISHED_LICENCE = "CC BY-NC 4.0"
SCRATCH_LICENCE = "not stated (trained from scratch: its owner decides)"
UNKNOWN_LICENCE = "unknown (that of the weights' source)"

# A note for files that do not give their activation, which has no tensors.
EXACT_GELU = "activation: exact GELU assumed, as the file does not say (not quick- or tanh-GELU)"

# Names of baselines in a low-shot table.
RANDOM, PIXELS, MAJORITY = BASELINES = ("random", "pixels", "majority")

WHOLE_BELOW = 64  # px
MAX_DIFFERENCES = 10
# Characters and entries of a header; ours are far smaller.
_MAX_PLAIN = 100_000

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Family(StrEnum):
    """Family of a trunk: which libraries compute it, under which names."""

    VIT = "vit"
    """Plain: ViT, DeiT, DINO, iBOT, MoCo v3, MSN, MAE."""
    DINOV2 = "dinov2"
    """Layer scales, with or without registers; DeiT III too."""
    DINOV3 = "dinov3"
    """Rotary positions; EUPE too."""


def family_of(model: Mapping[str, Any]) -> Family:
    """The family of a `VisionTransformer` by its arguments."""
    if model.get("position") == "rope":
        return Family.DINOV3
    return Family.VIT if model.get("layer_scale") is None else Family.DINOV2


def resized_positions(
    trunk: Mapping[str, Tensor], model: Mapping[str, Any], image_size: int
) -> tuple[dict[str, Tensor], str]:
    """A trunk's state dict for another native image size, by its family's own rule.

    Returns:
        The state dict and the rule in words. Without learned positions nothing changes.
    """
    if "pos_embed" not in trunk:
        return dict(trunk), "rotary positions need no resizing"
    side = image_size // int(model["patch_size"])
    rule: dict[str, Any] = {}
    how = "bicubic, no antialias"
    if not model.get("class_position", True):
        rule, how = {"antialias": True}, "bicubic with antialias, as DINOv2 with registers"
    elif family_of(model) is Family.DINOV2:
        rule, how = {"offset": 0.1}, "bicubic, no antialias, offset 0.1, as DINOv2"
    resized = resize_position_embeddings(trunk["pos_embed"], (side, side), **rule)
    return {**trunk, "pos_embed": resized}, how


@dataclass(frozen=True)
class Weights:
    """Weights read from any supported file, in the names of `msn.method`."""

    trunk: dict[str, Tensor]
    """State dict of the (target) `VisionTransformer`, at least float32."""
    model: dict[str, Any]
    """Arguments of `VisionTransformer`: six numbers, and options that are not a plain ViT's."""
    source: str
    """The kind of file, e.g. "msn checkpoint", "huggingface mae"."""
    head: dict[str, Tensor] | None = None
    """State dict of the target's `ProjectionHead`."""
    prototypes: Tensor | None = None
    """[K, P]."""
    anchor_trunk: dict[str, Tensor] | None = None
    anchor_head: dict[str, Tensor] | None = None
    decoder: dict[str, Tensor] | None = None
    """State dict of MAE's `Decoder`; not compared with one, see `msn.weights.mae`."""
    meta: dict[str, Any] = field(default_factory=dict)
    """epoch, data, method, licence, init, mean, std as far as the file says; `kind` if it is "mae";
    `pool` if it is "mean": then features are the final norm of the mean of patches."""
    ignored: tuple[str, ...] = ()
    """Names in the file that the network does not have."""
    notes: tuple[str, ...] = ()
    """What was assumed or removed in reading, for a warning."""
    native: Native = PAPER
    """What the family of the weights takes as the feature of an image."""


def say_notes(said: Weights | Sequence[str], where: str) -> None:
    """Warn about what was assumed: a wrong number of heads gives wrong features, not an error."""
    for note in said.notes if isinstance(said, Weights) else said:
        log.warning("%s: %s", where, note)


def check_heads(weights: Weights, num_heads: int | None, where: str) -> None:
    """Raise a UserError if `num_heads` is not the number of heads that the file says."""
    heads = weights.model["num_heads"]
    if num_heads not in (None, heads):
        raise UserError(
            f"model.num_heads={num_heads}: {where} itself says {heads} attention heads; leave the "
            "key out"
        )


def check_tensors(tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse tensors that a network cannot use, by name.

    Raises:
        UserError: if one is not dense, not of a float type of 16 to 64 bits (except counters), or
            holds numbers that are not finite in float32.
    """
    wrong = []
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            wrong.append(f"{name} is not a dense tensor with numbers")
        elif name.endswith("num_batches_tracked") and tensor.dtype == torch.int64:
            continue
        elif tensor.dtype not in _FLOATS:
            kind = str(tensor.dtype).removeprefix("torch.")
            wrong.append(f"{name} is {kind}, not float64, float32, float16 or bfloat16")
        elif not bool(torch.isfinite(tensor.float()).all()):
            wrong.append(f"{name} holds NaN or infinity")
    if wrong:
        raise UserError(f"{where}: {summary(wrong)}")


def check_plain(value: Any, where: str) -> None:
    """Refuse a header that holds anything but plain data, or too much of it.

    Raises:
        UserError: naming the file.
    """
    left, counted = [value], 0
    while left:
        part = left.pop()
        counted += 1 + (len(part) if isinstance(part, str | dict | list | tuple) else 0)
        if isinstance(part, dict):
            left += [*part.keys(), *part.values()]
        elif isinstance(part, list | tuple):
            left += part
        elif not isinstance(part, str | float | bool | None) and not (
            isinstance(part, int) and abs(part) < 1 << 63
        ):
            raise UserError(f"{where}: damaged header (a {type(part).__name__})")
        if counted > _MAX_PLAIN:
            raise UserError(f"{where}: damaged header (too large)")


def trunk_digest(trunk: Mapping[str, Tensor]) -> str:
    """SHA-256 of a state dict with its names, shapes and types, in hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(trunk.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\0".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_number(value: Any, where: str) -> float:
    """A number above 0, or a UserError."""
    if not isinstance(value, int | float) or not 0 < value < 1e6:
        raise UserError(f"{where}: must be a number above 0, got {str(value)[:80]}")
    return float(value)


def check_channels(value: Any, where: str, *, positive: bool = False) -> None:
    """Raise a UserError unless a value is three numbers, as the mean and std of channels are."""
    numbers = isinstance(value, list | tuple) and all(
        isinstance(part, int | float) and abs(part) < 1e6 and (part > 0 or not positive)
        for part in value
    )
    if not numbers or len(value) != 3:
        what = "three numbers above 0" if positive else "three numbers"
        raise UserError(f"{where}: must be {what}, got {str(value)[:80]}")


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


def short_side(image_size: int) -> int:
    """Length in px of the short side before the centre crop: 256 for 224.

    Below 64 px the crop is the whole image, as is usual for digits and CIFAR, which have that size
    already.
    """
    return image_size if image_size < WHOLE_BELOW else round(image_size * 256 / 224)


def build_trunk(weights: Weights) -> VisionTransformer:
    """The `VisionTransformer` of some weights, loaded strictly, in eval mode.

    float32, or float64 where the weights are.
    """
    trunk = VisionTransformer(**weights.model)
    trunk.to(weights.trunk["cls_token"].dtype)
    trunk.load_state_dict(weights.trunk, strict=True)
    return trunk.eval()


@torch.no_grad()
def prototype_cosines(weights: Weights, tokens: Tensor) -> Tensor:
    """Cosines between projected class tokens and the prototypes of some weights.

    Args:
        weights: with `head` and `prototypes`.
        tokens: class tokens after the final norm, [n, D].

    Returns:
        [n, K], on the device of the tokens.
    """
    state, prototypes = weights.head, weights.prototypes
    assert state is not None
    assert prototypes is not None
    head = ProjectionHead(
        state["fc1.weight"].shape[1],
        hidden_dim=state["fc1.weight"].shape[0],
        output_dim=state["fc3.weight"].shape[0],
        use_batch_norm="bn1.weight" in state,
    )
    head.load_state_dict(state)
    # In eval mode an image's projection does not depend on the others of its batch.
    projections = F.normalize(head.eval().float().to(tokens.device)(tokens), dim=1)
    return projections @ F.normalize(prototypes.float().to(tokens.device), dim=1).T


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
