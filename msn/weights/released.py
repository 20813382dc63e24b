"""The layouts of facebookresearch/msn and facebookresearch/mae."""

import math
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from msn.method.positions import sincos_positions
from msn.weights.weights import strip_prefix

HEAD_PREFIX = "fc."  # of MSN's projection head
# Of MAE's classifiers: the norm of the mean of patches, which stands in for the final norm.
_POOLED_NORM = "fc_norm."
# MAE's settings that travel in its training checkpoints, in our names.
_MAE_ARGUMENTS = ("mask_ratio", "norm_pix_loss")

POOLED = (
    "fine-tuned MAE (fc_norm, no norm): its feature is the mean of patch tokens through fc_norm"
)


def split_encoder(
    encoder: Mapping[Any, Any],
) -> tuple[dict[str, Tensor], dict[str, Tensor] | None, tuple[str, ...]]:
    """Trunk, head (None if there is none) and ignored names of an encoder of facebookresearch/msn.

    Trunk and head (`fc.*`) stand together under DDP's prefix `module.`; the reference's optional
    prediction head (`pred.*`) has no place in our network.
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
    """The decoder beside a trunk in MAE's names, in those of `msn.method.mae.Decoder`, if any."""
    decoder = strip_prefix(tensors, "decoder_")
    if decoder and "mask_token" in tensors:
        decoder["mask_token"] = tensors["mask_token"]
    return decoder or None


def arguments_of_mae(content: Mapping[str, Any]) -> dict[str, Any]:
    """What a training checkpoint of MAE says of its mask and loss; nothing in published files."""
    said = content.get("args")
    found = vars(said) if isinstance(said, Namespace) else {}
    method = {name: found[name] for name in _MAE_ARGUMENTS if name in found}
    return {"method": method} if method else {}


def has_positions_of_mae(trunk: Mapping[str, Tensor]) -> bool:
    """Whether the position embeddings are MAE's fixed ones: what tells its files without decoder.

    Zeros for the class token, then sines and cosines that begin with the column (appendix A).
    """
    found = trunk.get("pos_embed")
    if found is None or found.ndim != 3 or found.shape[1] < 2 or found.shape[2] % 4:
        return False
    side = math.isqrt(found.shape[1] - 1)
    if found.shape[1] != 1 + side**2 or not found.is_floating_point() or bool(found[0, 0].any()):
        return False
    expected = sincos_positions(side, found.shape[2])
    return bool((found[0, 1:].double() - expected).abs().max() < 1e-2)  # half precision rounds


def pooled_norm(trunk: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The same trunk with `fc_norm` as its final norm, where it has no other; else None."""
    norm = strip_prefix(trunk, _POOLED_NORM)
    if not norm or any(name.startswith("norm.") for name in trunk):
        return None
    rest = {name: tensor for name, tensor in trunk.items() if not name.startswith(_POOLED_NORM)}
    return rest | {f"norm.{name}": tensor for name, tensor in norm.items()}
