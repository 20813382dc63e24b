"""Find the vision transformer in a file, and infer its architecture.

Names and shapes give it; where they do not, published models do.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from msn.errors import UserError
from msn.method.vit import LAYER_NORM_EPS, PLAIN, VisionTransformer, exact_ratio
from msn.weights.released import has_fixed_positions
from msn.weights.weights import Family, check_tensors, differences, family_of, strip_prefix, summary

# Ends messages about backbones that our trunk does not compute.
NOT_OURS = "it can be measured, but not trained from or exported"

MAX_BLOCKS = 1000
# The one tensor that every vision transformer has, in timm's and in Hugging Face's names.
_MARKS = (
    "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.weight",
    "embeddings.patch_embeddings.weight",
)
_MAX_NESTED = 4  # dictionaries in one another
_BARE = "."
# Attention heads of published vision transformers by their width, with the source.
_PUBLISHED_HEADS = {
    192: {3: "DeiT-Ti, arXiv 2012.12877, Table 1"},
    384: {6: "DeiT-S, DINO, MSN: arXiv 2012.12877, Table 1", 12: "MoCo v3's ViT-S, its vits.py"},
    768: {12: "ViT-B, arXiv 2010.11929, Table 1"},
    1024: {16: "ViT-L, arXiv 2010.11929, Table 1"},
    1280: {16: "ViT-H, arXiv 2010.11929, Table 1"},
    1408: {16: "ViT-g, arXiv 2106.04560, Table 2"},
    1664: {16: "ViT-G, arXiv 2106.04560, Table 2"},
}
# Width of a head in all of facebookresearch/msn, and in DINOv2 and DINOv3 of these widths.
_RELEASED_HEAD = 64
_DINO_WIDTHS = (192, 384, 768, 1024, 1280, 1536)
_ROTARY_EPS = 1e-5  # of DINOv3, in timm and transformers
LAYER_SCALE = 1e-5  # initial value; without effect on a trunk that is loaded from a file
_SAID = ("rope_base",)

# Parts of names that identify families which our trunk does not compute.
_FAMILIES = (
    ("detection_tokens", "YOLOS"),
    ("lambda_1", "a vision transformer with layer scale, as BEiT"),
    ("relative_position_bias_table", "BEiT or Swin"),
    ("dist_token", "distilled DeiT"),
    ("distillation_token", "distilled DeiT"),
    ("norm_pre.", "CLIP"),
    ("pre_layrnorm", "CLIP"),
    ("embeddings.patch_embedding.", "CLIP or SigLIP"),
    ("conv_proj.", "torchvision's vision transformer"),
    ("vision_model.", "CLIP or SigLIP"),
    ("transformer.resblocks.", "CLIP"),
    ("attn.q_proj", "EVA-02"),
    ("rope.", "a vision transformer with rotary positions that are not DINOv3's"),
    ("q_norm", "a vision transformer with normalised queries"),
    ("attn.q_bias", "EVA-02 or BEiT"),
    ("fc_norm.", "a vision transformer that averages its patches, as fine-tuned MAE"),
)

# Tensors, with their number of axes, that give the sizes of a vision transformer. One with rotary
# positions has no `pos_embed`.
_SIZED_BY = {
    "cls_token": 3,
    "pos_embed": 3,
    "patch_embed.proj.weight": 4,
    "blocks.0.mlp.fc2.weight": 2,
}
# Without `pos_embed`, any of these means rotary positions.
_ROTARY = ("blocks.0.gamma_1", "blocks.0.attn.q_bias", "reg_token")
# Image size in px that is assumed where a file with rotary positions does not give it.
_ROTARY_SIZE = 224
_LONGEST_GRID = 16  # sides of a grid of patches, long to short
_OURS = ("cls_token", "reg_token", "pos_embed", "patch_embed.proj.", "blocks.", "norm.")


def infer_model(
    trunk: Mapping[str, Tensor],
    told: Mapping[str, Any],
    num_heads: int | None,
    family: str | None,
    where: str,
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The arguments of the `VisionTransformer` that a state dict belongs to.

    Args:
        trunk: state dict in timm's names.
        told: what the file itself says. Of the arguments, `num_heads`, `layer_norm_eps`,
            `rope_base` and, with rotary positions, `img_size` are taken from here; shapes give the
            others. `released`: whether facebookresearch/msn wrote it; `family`, if known.
        num_heads: used where the file does not say it.
        family: likewise, see `Family`.
        where: the path, for messages.

    Returns:
        The six numbers with all options that a plain ViT does not have, and what was assumed.

    Raises:
        UserError: if this is not a vision transformer, or its heads or its family cannot be
            inferred.
    """
    _check_known_layout(trunk, where)
    model = _shapes(trunk)
    check_trunk(trunk, model, where)
    check_tensors(trunk, where)
    _check_family(model, told, family, where)
    notes: tuple[str, ...] = ()
    if "pos_embed" in trunk:
        if told.get("img_size") != model["img_size"]:  # a file that says its size has a square grid
            _check_grid(trunk["pos_embed"], where)
    elif (size := told.get("img_size")) is None:
        model["img_size"] = _ROTARY_SIZE // model["patch_size"] * model["patch_size"]
        notes += (f"image size: {model['img_size']} px assumed; the file does not say",)
    else:
        model["img_size"] = size
    width = model["embed_dim"]
    heads = told.get("num_heads", num_heads)
    if heads is None:
        heads, source = _published_heads(trunk, model, bool(told.get("released")), where)
        notes += (f"attention heads: {heads} assumed ({source}); model.num_heads overrides",)
    if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1:
        raise UserError(f"{where}: num_heads must be a whole number >= 1, got {str(heads)[:80]}")
    if width % heads:
        raise UserError(f"{where}: width {width} is not divisible by num_heads {heads}")
    model["num_heads"] = heads
    is_rotary = family_of(model) is Family.DINOV3
    eps = told.get("layer_norm_eps", _ROTARY_EPS if is_rotary else LAYER_NORM_EPS)
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 <= eps <= 1:
        raise UserError(f"{where}: layer_norm_eps must be in [0, 1], got {str(eps)[:80]}")
    if eps != LAYER_NORM_EPS:
        model["layer_norm_eps"] = eps
    said = {key: told[key] for key in _SAID if key in told}
    model |= {key: value for key, value in said.items() if is_rotary and value != PLAIN[key]}
    return model, notes


def _shapes(trunk: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments that names and shapes give, with one attention head."""
    patch, hidden = trunk["patch_embed.proj.weight"], trunk["blocks.0.mlp.fc2.weight"]
    width, patch_size = patch.shape[0], patch.shape[-1]
    is_rotary = "pos_embed" not in trunk
    patches = 1 if is_rotary else trunk["pos_embed"].shape[1]
    side = math.isqrt(patches)
    first = trunk.get("blocks.0.mlp.fc1.weight")
    gated = first is None or first.shape[0] == 2 * hidden.shape[1]
    bias = "q_bias" if is_rotary else "qkv.bias"
    scale = "blocks.0.gamma_1" if is_rotary else "blocks.0.ls1.gamma"
    options = {
        "registers": trunk["reg_token"].shape[1] if "reg_token" in trunk else 0,
        "layer_scale": LAYER_SCALE if scale in trunk else None,
        "mlp": "swiglu" if gated else "gelu",
        "position": "rope" if is_rotary else "learned",
        "class_position": is_rotary or patches != side**2,
        "qkv_bias": f"blocks.0.attn.{bias}" in trunk,
    }
    return {
        "img_size": side * patch_size,
        "patch_size": patch_size,
        "embed_dim": width,
        "depth": len({found[1] for name in trunk if (found := re.match(r"blocks\.(\d+)\.", name))}),
        "num_heads": 1,
        "mlp_ratio": exact_ratio(hidden.shape[1], width),
        **{name: value for name, value in options.items() if value != PLAIN[name]},
    }


def _check_family(
    model: Mapping[str, Any], told: Mapping[str, Any], family: str | None, where: str
) -> None:
    """Refuse a family that the tensors contradict; ask for it where names and shapes fit several.

    Rotary positions have no tensors: only DINOv3's registers identify them.
    """
    allowed = ", ".join(Family)
    if family is not None and family not in list(Family):
        raise UserError(f"init_family must be one of {allowed}, got {str(family)[:80]!r}")
    found = family_of(model)
    ours = Family.DINOV3 if told.get("position") == "rope" else None  # of a header of ours
    said = told.get("family") or ours or family
    if said is not None and said != found:
        raise UserError(f"{where}: init_family={said}: its tensors are those of {found}")
    if family is not None and family != said:
        raise UserError(f"{where}: init_family={family}: the file itself says {said}")
    if said is None and found is Family.DINOV3 and not model.get("registers"):
        raise UserError(
            f"{where}: has no position embeddings, and several rotary ones fit its tensors: "
            "init_family=dinov3 if it is DINOv3's or EUPE's kind; others are not read"
        )


def _published_heads(
    trunk: Mapping[str, Tensor], model: Mapping[str, Any], released: bool, where: str
) -> tuple[int, str]:
    """Attention heads of the published model of that width, and its name."""
    width = int(trunk["cls_token"].shape[-1])
    kind = family_of(model)
    if kind is not Family.VIT and width in _DINO_WIDTHS:
        return width // _RELEASED_HEAD, f"64 wide, as published with {kind}"
    if released and width % _RELEASED_HEAD == 0:
        return width // _RELEASED_HEAD, "64 wide, as all of facebookresearch/msn"
    known = _PUBLISHED_HEADS.get(width, {})
    if len(known) > 1 and has_fixed_positions(trunk, columns_first=False):  # MoCo v3's
        known = {12: known[12]}
    if len(known) == 1:
        ((heads, source),) = known.items()
        return heads, source
    choices = " or ".join(f"{heads} ({source})" for heads, source in known.items())
    why = f"width {width} is published with {choices}" if known else f"width {width} is not usual"
    raise UserError(
        f"{where}: does not say its number of attention heads, and {why}: give model.num_heads"
    )


def _check_grid(pos_embed: Tensor, where: str) -> None:
    """Refuse a grid of patches that is not square, if its embeddings show it.

    Neighbours within a row are alike; the end of a row and the start of the next are not. So the
    similarity of patches i and i + 1 drops at every multiple of the number of columns.
    """
    side = math.isqrt(pos_embed.shape[1])
    count = side**2
    patches = pos_embed[0, -count:].detach().double()
    patches = F.normalize(patches - patches.mean(0), dim=1)
    alike = (patches[1:] * patches[:-1]).sum(1)
    alike = F.normalize(alike - alike.mean(), dim=0)
    drops = {side: 0.0}
    # No known model has longer grids, but embeddings enlarged from 14 to 28 repeat by 2.
    longest = _LONGEST_GRID * count
    shapes = (n for n in range(2, count) if count % n == 0)
    for columns in (n for n in shapes if count <= _LONGEST_GRID * n * n and n * n <= longest):
        ends = (torch.arange(1, count) % columns == 0).double()
        drops[columns] = -float(alike @ F.normalize(ends - ends.mean(), dim=0))
    best = max(drops, key=lambda columns: drops[columns])
    # By chance a drop exceeds 5 / sqrt(count) about once in a million grids.
    if drops[best] > max(0.5, 5 / math.sqrt(count)) and drops[best] > drops[side] + 0.2:
        raise UserError(
            f"{where}: its position embeddings are those of {count // best} x {best} patches; "
            "only square grids are read"
        )


def check_trunk(trunk: Mapping[str, Tensor], model: Mapping[str, Any], where: str) -> None:
    """Refuse a state dict that is not exactly one of the `VisionTransformer` of these numbers.

    Raises:
        UserError: naming at most ten differing keys and shapes.
    """
    depth = int(model["depth"])
    if depth > MAX_BLOCKS:
        raise UserError(f"{where}: {depth} blocks; at most {MAX_BLOCKS} are read")
    with torch.device("meta"):
        expected = VisionTransformer(**{**model, "depth": 1}).state_dict()
    first = strip_prefix(expected, "blocks.0.")
    expected |= {
        f"blocks.{i}.{name}": shape for i in range(1, depth) for name, shape in first.items()
    }
    found = differences(trunk, expected)
    if found:
        raise _another(trunk, found, where)


class OtherArchitecture(UserError):
    """These weights are of a backbone that our trunk does not compute; its library may."""


def _another(trunk: Mapping[str, Tensor], wrong: list[str], where: str) -> UserError:
    """The error for a state dict of another architecture, or for half of one of ours."""
    what = family(trunk)
    kind = OtherArchitecture if what else UserError
    return kind(f"{where}: another architecture{what}: {summary(wrong)}")


def family(names: Iterable[str]) -> str:
    """What a state dict of another architecture seems to be, for a message; may be empty."""
    names = list(names)
    for sign, what in _FAMILIES:
        if any(sign in name for name in names):
            return f" ({what}: {NOT_OURS})"
    if "pos_embed" in names and "cls_token" not in names:
        return f" (a vision transformer without class token: {NOT_OURS})"
    return ""


def _check_known_layout(trunk: Mapping[str, Tensor], where: str) -> None:
    """Refuse tensors from which the sizes of a vision transformer cannot be read."""
    wrong = []
    is_rotary = "pos_embed" not in trunk and any(name in trunk for name in _ROTARY)
    for name, dims in _SIZED_BY.items():
        if name == "pos_embed" and is_rotary:
            continue
        if name not in trunk:
            wrong.append(f"{name} is missing")
        elif trunk[name].ndim != dims or 0 in trunk[name].shape:
            wrong.append(f"{name} is {list(trunk[name].shape)}, not {dims} axes")
    first = trunk.get("blocks.0.mlp.fc1.weight", torch.empty(1, 1))
    if first.ndim != 2 or 0 in first.shape:
        wrong.append(f"blocks.0.mlp.fc1.weight is {list(first.shape)}, not 2 axes")
    if "reg_token" in trunk and (trunk["reg_token"].ndim != 3 or 0 in trunk["reg_token"].shape):
        wrong.append(f"reg_token is {list(trunk['reg_token'].shape)}, not 3 axes")
    if "pos_embed" in trunk and not wrong:
        places = trunk["pos_embed"].shape[1]
        squares = [n for n in (places, places - 1) if math.isqrt(n) ** 2 == n]
        if places < 2 or not squares:
            wrong.append(f"pos_embed has {places} places, not a square and the class token's")
    if wrong:
        wrong += [
            f"{name} {list(tensor.shape)} is not expected"
            for name, tensor in trunk.items()
            if not name.startswith(_OURS)
        ]
        raise _another(trunk, wrong, where)


class Candidate(NamedTuple):
    """The tensors of one trunk, and what stands beside them."""

    name: str
    """Its name for `init_key`: dictionaries and prefix, joined by dots."""
    tensors: dict[str, Tensor]
    """Without the prefix."""
    beside: dict[str, Tensor]
    """The rest of the same dictionary."""


def find_trunk(content: Mapping[Any, Any], key: str | None, where: str) -> Candidate:
    """The one trunk in nested dictionaries of tensors, or the one that `key` names.

    If there is none, the dictionary with most tensors, unchanged.

    Args:
        content: what a file holds.
        key: the name of a trunk, or its beginning up to a dot; None where there is only one.
        where: the path, for messages.

    Raises:
        UserError: if there are no tensors, several trunks and no key, or none of that key.
    """
    dictionaries = _dictionaries(content)
    found = [
        _candidate(path, tensors, name.removesuffix(mark))
        for path, tensors in dictionaries
        for name in tensors
        for mark in _MARKS
        if name == mark or name.endswith(f".{mark}")
    ]
    names = ", ".join(sorted(candidate.name for candidate in found)[:10])
    if key is not None:
        found = [one for one in found if one.name == key or one.name.startswith(f"{key}.")]
        if len(found) != 1:
            if names == _BARE:
                raise UserError(
                    f"{where}: init_key={key}: the file holds one backbone, without a name; leave "
                    "init_key out"
                )
            raise UserError(f"{where}: init_key={key} must be one of {names or 'none'}")
    if len(found) > 1:
        raise UserError(f"{where}: holds several backbones, {names}: init_key=NAME chooses one")
    if not found:
        path, tensors = max(dictionaries, key=lambda entry: len(entry[1]), default=("", {}))
        if not tensors:
            raise UserError(f"{where}: holds no tensors")
        return Candidate(_BARE, tensors, {})
    return found[0]


def _candidate(path: str, tensors: dict[str, Tensor], prefix: str) -> Candidate:
    name = f"{path}.{prefix}".strip(".") or _BARE
    beside = {other: value for other, value in tensors.items() if not other.startswith(prefix)}
    return Candidate(name, strip_prefix(tensors, prefix), beside)


def _dictionaries(content: Mapping[Any, Any]) -> list[tuple[str, dict[str, Tensor]]]:
    """Every dictionary with tensors once, with the path of names to it."""
    found, seen, left = [], set(), [("", content, 0)]
    while left:
        path, entries, depth = left.pop()
        if id(entries) in seen:
            continue
        seen.add(id(entries))
        named = {name: value for name, value in entries.items() if isinstance(name, str)}
        tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
        if tensors:
            found.append((path, tensors))
        left += [
            (f"{path}.{name}".strip("."), value, depth + 1)
            for name, value in named.items()
            if isinstance(value, dict) and depth < _MAX_NESTED
        ]
    return found
