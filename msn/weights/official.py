"""The layout of facebookresearch/msn's `.pth.tar` files, both ways.

`encoder` (anchor) and `target_encoder` hold trunk and projection head (`fc.*`) together under the
`module.` prefix of DDP; the published files have `target_encoder` and `prototypes` alone.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from msn.errors import UserError
from msn.weights.weights import Weights, strip_prefix

HEAD_PREFIX = "fc."


def split_encoder(
    encoder: Mapping[Any, Any],
) -> tuple[dict[str, Tensor], dict[str, Tensor] | None, tuple[str, ...]]:
    """Trunk, head (None if there is none) and ignored names of an `encoder` of the layout.

    The reference's optional prediction head (`pred.*`) has no place in our network.
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


def official_layout(weights: Weights) -> dict[str, Any]:
    """What to `torch.save` so that the reference's loaders find their keys.

    `encoder` is there where the weights have an anchor; `epoch` where they say one.

    Raises:
        UserError: if the norms have another eps than the reference's, which the layout cannot say.
    """
    if "layer_norm_eps" in weights.model:
        eps = weights.model["layer_norm_eps"]
        raise UserError(f"format=official: cannot say layer_norm_eps={eps:g}; format=torch can")
    layout: dict[str, Any] = {}
    if weights.anchor_trunk is not None:
        layout["encoder"] = _joined(weights.anchor_trunk, weights.anchor_head)
    layout["target_encoder"] = _joined(weights.trunk, weights.head)
    if weights.prototypes is not None:
        layout["prototypes"] = weights.prototypes
    if weights.meta.get("epoch") is not None:
        layout["epoch"] = weights.meta["epoch"]
    return layout


def _joined(trunk: Mapping[str, Tensor], head: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    parts = dict(trunk) | {f"{HEAD_PREFIX}{name}": tensor for name, tensor in (head or {}).items()}
    return {f"module.{name}": tensor for name, tensor in parts.items()}
