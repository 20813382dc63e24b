"""Start pretraining from weights that exist: `train.py init=PATH`."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from msn.errors import UserError
from msn.method.mae import MAE
from msn.method.network import MSN, Network
from msn.method.positions import resize_position_embeddings
from msn.method.vit import LAYER_NORM_EPS, VisionTransformer
from msn.weights.weights import Weights, differences, summary


def initialise(network: Network, weights: Weights) -> list[tuple[str, str]]:
    """Load what fits of a file into a fresh network; see `initialise_msn` and `initialise_mae`.

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
    """Load the trunk with the file's positions, which stay as they are, and a decoder that fits.

    Arguments, result and errors are those of `initialise`.
    """
    resized = _check_fits(network.trunk, weights)
    _load_trunk(network.trunk, weights.trunk)
    rows = [
        ("trunk", resized or f"loaded from {weights.source}"),
        ("positions", "the file's, and not trained from here on"),
        *_noted(network.trunk, weights),
        ("decoder", _load_part(network.decoder, weights.decoder)),
    ]
    unused = {"head": weights.head, "prototypes": weights.prototypes}
    rows += [(part, "ignored") for part, found in unused.items() if found is not None]
    rows += [(name, "ignored") for name in _grouped(weights.ignored)]
    return rows


def _noted(trunk: VisionTransformer, weights: Weights) -> list[tuple[str, str]]:
    """What is told of a trunk that was loaded."""
    ours = trunk.model_config.get("layer_norm_eps", LAYER_NORM_EPS)
    theirs = weights.model.get("layer_norm_eps", LAYER_NORM_EPS)
    rows = [("LayerNorm's eps", f"{ours:g} here, {theirs:g} in the file")] if ours != theirs else []
    return rows + [("note", note) for note in weights.notes]


def initialise_msn(network: MSN, weights: Weights) -> list[tuple[str, str]]:
    """Load trunk, and head and prototypes where they are there and fit, into a fresh network.

    The anchor gets the file's own anchor where it has one, else the target's weights as the target
    does. A part that is not there or does not fit keeps its fresh initialisation; head and target
    head stay equal then.

    Args:
        network: freshly built; changed in place.
        weights: as `read_weights` gives them.

    Returns:
        A table of (part, what happened to it): loaded, resized, initialised or ignored.

    Raises:
        UserError: if the trunks differ in more than the image size; the network is unchanged then.
    """
    resized = _check_fits(network.target.trunk, weights)
    note = resized or f"loaded from {weights.source}"
    anchor_trunk, anchor_head = weights.anchor_trunk, weights.anchor_head
    own = "" if anchor_trunk is not None else " (the target's: the file has no anchor)"
    _load_trunk(network.target.trunk, weights.trunk)
    _load_trunk(network.anchor.trunk, anchor_trunk or weights.trunk)
    rows = [("target trunk", note), ("anchor trunk", note + own)]
    rows += _noted(network.target.trunk, weights)
    if weights.decoder is not None:  # of masked autoencoders, whose positions are fixed
        places = network.anchor.trunk.pos_embed
        trained = places is not None and places.requires_grad
        rows.append(("positions", "the file's" + (", and trained from here on" * trained)))
        rows.append(("decoder", "ignored"))
    rows.append(("target head", _load_part(network.target.head, weights.head)))
    rows.append(("anchor head", _load_part(network.anchor.head, anchor_head or weights.head)))
    rows.append(("prototypes", _load_prototypes(network.prototypes, weights.prototypes)))
    rows += [(name, "ignored") for name in _grouped(weights.ignored)]
    return rows


def _check_fits(trunk: VisionTransformer, weights: Weights) -> str | None:
    """What happens to the position embeddings if not a plain load."""
    expected = dict(trunk.state_dict())
    found = dict(weights.trunk)
    size, native = trunk.img_size, weights.model["img_size"]
    positions = [state.get("pos_embed") for state in (found, expected)]
    shapes = {None if state is None else state.shape for state in positions}
    same_positions = len(shapes) == 1
    if not same_positions and None not in shapes:
        found.pop("pos_embed")
        expected.pop("pos_embed")
    wrong = differences(found, expected)
    heads = weights.model["num_heads"]
    if heads != trunk.num_heads:
        wrong.append(f"attention heads are {heads} instead of {trunk.num_heads} (model.num_heads)")
    if wrong:
        raise UserError(f"weights of another architecture than model: {summary(wrong)}")
    if same_positions:
        return None
    return f"loaded from {weights.source}, position embeddings resized from {native} to {size} px"


def _load_trunk(trunk: VisionTransformer, tensors: Mapping[str, Tensor]) -> None:
    tensors = dict(tensors)
    if trunk.pos_embed is not None and tensors["pos_embed"].shape != trunk.pos_embed.shape:
        side = trunk.img_size // trunk.patch_size
        tensors["pos_embed"] = resize_position_embeddings(tensors["pos_embed"], (side, side))
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
    """'decoder.a.weight', 'decoder.b.weight' -> 'decoder.*', each group once."""
    return list(dict.fromkeys(f"{name.split('.')[0]}.*" if "." in name else name for name in names))
