"""Load existing weights into a fresh network: `train.py init=PATH`."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from msn.errors import UserError
from msn.method.mae import MAE
from msn.method.network import MSN, Network
from msn.method.vit import PLAIN, VisionTransformer
from msn.weights.weights import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Weights,
    differences,
    resized_positions,
    summary,
)


def initialise(network: Network, weights: Weights) -> list[tuple[str, str]]:
    """Load the parts of a file that fit into a fresh network.

    See `initialise_msn` and `initialise_mae`.

    Args:
        network: freshly built; changed in place.
        weights: as `read_weights` gives them.

    Returns:
        A table of (part, what happened to it): loaded, resized, initialised or ignored.

    Raises:
        UserError: if the trunks differ in more than the image size; the network is unchanged then.
    """
    if isinstance(network, MSN):
        return initialise_msn(network, weights)
    assert isinstance(network, MAE)
    return initialise_mae(network, weights)


def initialise_mae(network: MAE, weights: Weights) -> list[tuple[str, str]]:
    """Load the trunk with the file's positions, which are not trained, and a decoder that fits.

    Arguments, result and errors are those of `initialise`.
    """
    note = _check_fits(network.trunk, weights)
    _load_trunk(network.trunk, weights.trunk, weights.model)
    rows = [
        ("trunk", note),
        ("positions", "the file's, and not trained from here on"),
        *_noted(network.trunk, weights),
        ("decoder", _load_part(network.decoder, weights.decoder)),
    ]
    unused = {"head": weights.head, "prototypes": weights.prototypes}
    rows += [(part, "ignored") for part, found in unused.items() if found is not None]
    # The decoder has a row of its own, but readers of trunks count it as ignored.
    own = ("decoder", "mask_token")
    others = tuple(name for name in weights.ignored if not name.startswith(own))
    rows += [(name, "ignored") for name in _grouped(others)]
    return rows


def initialise_msn(network: MSN, weights: Weights) -> list[tuple[str, str]]:
    """Load the trunk, and head and prototypes if they exist and fit, into a fresh network.

    The anchor gets the file's anchor if there is one, else the target's weights. A part that is
    missing or does not fit keeps its fresh initialisation; both heads are equal then. Arguments,
    result and errors are those of `initialise`.
    """
    note = _check_fits(network.target.trunk, weights)
    anchor_trunk, anchor_head = weights.anchor_trunk, weights.anchor_head
    own = "" if anchor_trunk is not None else " (the target's: the file has no anchor)"
    _load_trunk(network.target.trunk, weights.trunk, weights.model)
    _load_trunk(network.anchor.trunk, anchor_trunk or weights.trunk, weights.model)
    rows = [("target trunk", note), ("anchor trunk", note + own)]
    rows += _noted(network.target.trunk, weights)
    if weights.decoder is not None:  # a masked autoencoder, whose positions are fixed
        places = network.anchor.trunk.pos_embed
        trained = places is not None and places.requires_grad
        rows.append(("positions", "the file's" + (", and trained from here on" * trained)))
        rows.append(("decoder", "ignored"))
    rows.append(("target head", _load_part(network.target.head, weights.head)))
    rows.append(("anchor head", _load_part(network.anchor.head, anchor_head or weights.head)))
    rows.append(("prototypes", _load_prototypes(network.prototypes, weights.prototypes)))
    rows += [(name, "ignored") for name in _grouped(weights.ignored)]
    return rows


def load_trunk(trunk: VisionTransformer, weights: Weights) -> None:
    """Load a file's (target) trunk alone, with positions for the trunk's own size.

    Raises:
        UserError: if the trunks differ in more than the image size; this one is unchanged then.
    """
    _check_fits(trunk, weights)
    _load_trunk(trunk, weights.trunk, weights.model)


def _noted(trunk: VisionTransformer, weights: Weights) -> list[tuple[str, str]]:
    """Rows about a loaded trunk: settings without tensors that differ, and notes."""
    names = {"layer_norm_eps": "LayerNorm's eps", "rope_base": "model.rope_base"}
    rows = []
    for name, title in names.items():
        ours, theirs = (said.get(name, PLAIN[name]) for said in (trunk.model_config, weights.model))
        if ours != theirs:
            rows.append((title, f"{ours:g} here, {theirs:g} in the file"))
    if trunk.model_config.get("qkv_bias", True) and not weights.model.get("qkv_bias", True):
        rows.append(("biases of queries and values", "0: the file has none"))
    for name, ours in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
        theirs = tuple(weights.meta.get(name, ours))
        if theirs != ours:
            rows.append((f"{name} of colours", f"training takes {ours}, the file {theirs}"))
    return rows + [("note", note) for note in weights.notes]


def _check_fits(trunk: VisionTransformer, weights: Weights) -> str:
    """Refuse a trunk that does not fit; else say what happens to it."""
    expected = dict(trunk.state_dict())
    found = _with_biases(trunk, weights.trunk)
    positions = [state.get("pos_embed") for state in (found, expected)]
    resized = None not in positions and len({p.shape for p in positions if p is not None}) > 1
    class_positions = {trunk.class_position, weights.model.get("class_position", True)}
    if resized and len(class_positions) == 1:
        found.pop("pos_embed")
        expected.pop("pos_embed")
    wrong = differences(found, expected)
    heads = weights.model["num_heads"]
    if heads != trunk.num_heads:
        wrong.append(f"attention heads are {heads} instead of {trunk.num_heads} (model.num_heads)")
    if wrong:
        raise UserError(f"weights of another architecture than model: {summary(wrong)}")
    note = f"loaded from {weights.source}"
    if not resized:
        return note
    native, size = weights.model["img_size"], trunk.img_size
    _, how = resized_positions(weights.trunk, weights.model, size)
    return f"{note}, position embeddings resized from {native} to {size} px ({how})"


def _with_biases(trunk: VisionTransformer, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with zeros for biases of rotary blocks that only the network has.

    The published biases of DINOv3 are 0, so timm's default models leave them out.
    """
    missing = {
        name: torch.zeros_like(tensor)
        for name, tensor in trunk.state_dict().items()
        if name.endswith((".q_bias", ".v_bias")) and name not in tensors
    }
    return {**tensors, **missing}


def _load_trunk(
    trunk: VisionTransformer, tensors: Mapping[str, Tensor], model: Mapping[str, Any]
) -> None:
    tensors = _with_biases(trunk, tensors)
    if trunk.pos_embed is not None and tensors["pos_embed"].shape != trunk.pos_embed.shape:
        tensors, _ = resized_positions(tensors, model, trunk.img_size)
    trunk.load_state_dict(tensors, strict=True)


def _load_part(part: nn.Module, tensors: Mapping[str, Tensor] | None) -> str:
    if tensors is None:
        return "initialised (the file has none)"
    wrong = differences(tensors, part.state_dict())
    if wrong:
        return f"initialised (the file's does not fit: {summary(wrong[:1])})"
    part.load_state_dict(tensors, strict=True)
    return "loaded"


@torch.no_grad()
def _load_prototypes(prototypes: nn.Parameter, tensor: Tensor | None) -> str:
    if tensor is None:
        return "initialised (the file has none)"
    if tensor.shape != prototypes.shape:
        want = list(prototypes.shape)
        return f"initialised (the file's are {list(tensor.shape)}, not {want})"
    prototypes.copy_(tensor)
    return "loaded"


def _grouped(names: tuple[str, ...]) -> list[str]:
    """'decoder.a.weight', 'decoder.b.weight' -> 'decoder.*'; a name alone stays."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.split(".")[0], []).append(name)
    return [f"{group}.*" if len(some) > 1 else some[0] for group, some in groups.items()]
