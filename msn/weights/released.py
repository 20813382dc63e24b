"""Read the layouts of facebookresearch/msn and facebookresearch/mae, and know their positions."""

import math
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from msn.method.positions import sincos_positions
from msn.weights.weights import strip_prefix

HEAD_PREFIX = "fc."  # of MSN's projection head
# In MAE's classifiers: the norm of the mean of patches, which replaces the final norm.
_POOLED_NORM = "fc_norm."
# Settings in MAE's training checkpoints, in our names.
_MAE_ARGUMENTS = ("mask_ratio", "norm_pix_loss")

POOLED = (
    "fine-tuned MAE (fc_norm, no norm): its feature is the mean of patch tokens through fc_norm"
)


def split_encoder(
    encoder: Mapping[Any, Any],
) -> tuple[dict[str, Tensor], dict[str, Tensor] | None, tuple[str, ...]]:
    """Trunk, head (None if there is none) and ignored names of an encoder of facebookresearch/msn.

    Trunk and head (`fc.*`) are both under DDP's prefix `module.`. The reference's optional
    prediction head (`pred.*`) is ignored.
    """
    names = {
        name.removeprefix("module."): tensor
        for name, tensor in encoder.items()
        if isinstance(name, str) and isinstance(tensor, Tensor)
    }
    head = strip_prefix(names, HEAD_PREFIX)
    ignored = tuple(name for name in names if name.startswith("pred."))
    trunk = {
        name: tensor
        for name, tensor in names.items()
        if not name.startswith(HEAD_PREFIX) and name not in ignored
    }
    return trunk, head or None, ignored


def decoder_of_mae(tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """MAE's decoder under the names of `msn.method.mae.Decoder`; None if there is none."""
    decoder = strip_prefix(tensors, "decoder_")
    if decoder and "mask_token" in tensors:
        decoder["mask_token"] = tensors["mask_token"]
    return decoder or None


def arguments_of_mae(content: Mapping[str, Any]) -> dict[str, Any]:
    """Mask and loss settings in a training checkpoint of MAE; published files have none."""
    said = content.get("args")
    found = vars(said) if isinstance(said, Namespace) else {}
    method = {name: found[name] for name in _MAE_ARGUMENTS if name in found}
    return {"method": method} if method else {}


def has_fixed_positions(trunk: Mapping[str, Tensor], *, columns_first: bool) -> bool:
    """Whether position embeddings are fixed sines and cosines, with zeros for the class token.

    Args:
        trunk: state dict in timm's names.
        columns_first: as in MAE (its appendix A); else rows first, as in MoCo v3 (section 5).
    """
    found = trunk.get("pos_embed")
    if found is None or found.ndim != 3 or found.shape[1] < 2 or found.shape[2] % 4:
        return False
    side = math.isqrt(found.shape[1] - 1)
    if found.shape[1] != 1 + side**2 or not found.is_floating_point() or bool(found[0, 0].any()):
        return False
    expected = sincos_positions(side, found.shape[2])
    if not columns_first:
        expected = expected.roll(found.shape[2] // 2, dims=1)
    return bool((found[0, 1:].double() - expected).abs().max() < 1e-2)  # half precision rounds


def pooled_norm(trunk: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The trunk with `fc_norm` as its final norm; None without `fc_norm` or with a norm already."""
    norm = strip_prefix(trunk, _POOLED_NORM)
    if not norm or any(name.startswith("norm.") for name in trunk):
        return None
    rest = {name: tensor for name, tensor in trunk.items() if not name.startswith(_POOLED_NORM)}
    return rest | {f"norm.{name}": tensor for name, tensor in norm.items()}
