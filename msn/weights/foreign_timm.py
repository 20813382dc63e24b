"""Any model of timm as a frozen backbone: timm's forward, pooling and preprocessing."""

import contextlib
import io
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import fields
from functools import partial
from typing import Any

import timm
import timm.data
from timm.models import PretrainedCfg
from torch import Tensor, nn

from msn.errors import UserError, brief
from msn.weights.families import native_of_timm
from msn.weights.foreign import Card, ForeignBackbone, checked
from msn.weights.weights import UNKNOWN_LICENCE, differences, summary

# Arguments of `create_model` that open files or build something other than the network.
_NOT_ARGUMENTS = {
    *("model_name", "pretrained", "checkpoint_path", "cache_dir", "pretrained_cfg"),
    *("pretrained_cfg_overlay", "features_only", "pretrained_model_args", "device", "dtype"),
}
# Of a pretrained_cfg, what says where weights come from.
_SOURCES = {"url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "custom_load"}
_PLAIN = {field.name for field in fields(PretrainedCfg)} - _SOURCES


def open_timm(
    name: str,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    image_size: int | None,
    where: str,
) -> ForeignBackbone:
    """A model of timm with the weights of a file.

    Args:
        name: of timm's model; a tag may follow after a dot.
        tensors: state dict in the model's names, or in those that timm itself converts.
        config: `config.json` of a timm directory; empty where only the name is known.
        image_size: side of the images in px; None takes the model's own.
        where: the path, for messages.

    Raises:
        UserError: if timm knows no such model, or the tensors are not exactly its own.
    """
    tensors = checked(tensors, where)
    arguments, pretrained = _settings(config, where)
    net = _create(name, arguments, pretrained, where)
    side = None if config else _side_of_positions(net, tensors)
    if side is not None:
        arguments["img_size"] = side
        net = _create(name, arguments, pretrained, where)
    _load(net, tensors, name, where)
    data = timm.data.resolve_model_data_config(net)
    native = data["input_size"][-1] if side is None else side
    size = native if image_size is None else image_size
    if size != native or data["input_size"][-2] != native:
        at_size = _create_at(size, name, arguments, pretrained, where)
        if at_size is not None:
            net, arguments = at_size, {**arguments, "img_size": size}
            _load(net, tensors, name, where)
    data["input_size"] = (3, size, size)
    tag = net.pretrained_cfg.get("tag")
    card = Card(
        where=where,
        library=f"timm {timm.__version__}",
        image_size=size,
        native=native_of_timm(f"{name.partition('.')[0]}.{tag}" if tag else name),
        transform=timm.data.create_transform(**data),
        preprocessing=_plain({"timm": timm.__version__, **data}),
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        patch_size=_patch_size(net),
        has_class_token=isinstance(getattr(net, "cls_token", None), Tensor),
        meta={"licence": net.pretrained_cfg.get("license") or UNKNOWN_LICENCE, "kind": "timm"},
        model_config=_plain({"timm": timm.__version__, "name": name, **arguments}),
        build=partial(_create, name, arguments, pretrained, where),
    )
    normed = isinstance(getattr(net, "norm", None), nn.Module)
    normed &= not isinstance(net.norm, nn.Identity) if normed else False
    return ForeignBackbone(net, "norm" if normed else None, card)


def _settings(config: Mapping[str, Any], where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of the model, and its pretrained_cfg, as timm takes them from a `config.json`."""
    arguments = dict(config.get("model_args") or {})
    pretrained = dict(config.get("pretrained_cfg", config) or {})
    if wrong := sorted(_NOT_ARGUMENTS & set(arguments)):
        raise UserError(f"{where}: model_args {', '.join(wrong)}: are not about the network")
    pretrained = {key: value for key, value in pretrained.items() if key in _PLAIN}
    if "num_classes" in config:
        pretrained["num_classes"] = config["num_classes"]
    size = arguments.get("img_size")
    if size is not None:  # as timm does: images have the network's own size
        sides = [size, size] if isinstance(size, int) else list(size)
        pretrained["input_size"] = [3, *sides]
    return arguments, pretrained


def _create(
    name: str, arguments: Mapping[str, Any], pretrained: Mapping[str, Any], where: str
) -> Any:
    """timm's model with random weights and no classifier."""
    try:
        # One name is both a model of timm and, with a tag, one of its configurations.
        return timm.create_model(
            name,
            pretrained=False,
            pretrained_cfg=dict(pretrained) or None,
            **{**arguments, "num_classes": 0},
        )
    except Exception as error:  # timm's models raise anything for arguments that are not theirs
        raise UserError(f"{where}: timm cannot build {name} ({brief(error)})") from error


def _create_at(
    size: int, name: str, arguments: Mapping[str, Any], pretrained: Mapping[str, Any], where: str
) -> Any:
    """The same for another image size; None for a network that takes any."""
    try:
        return _create(name, {**arguments, "img_size": size}, pretrained, where)
    except UserError as error:
        if isinstance(error.__cause__, TypeError):  # it has no such argument
            return None
        raise


def _side_of_positions(net: Any, tensors: Mapping[str, Tensor]) -> int | None:
    """Image side in px of a file's position embeddings, if it differs from the network's."""
    found, own = tensors.get("pos_embed"), getattr(net, "pos_embed", None)
    patch = _patch_size(net)
    if found is None or own is None or patch is None or found.shape == own.shape:
        return None
    before = 0 if getattr(net, "no_embed_class", False) else getattr(net, "num_prefix_tokens", 0)
    count = found.shape[1] - before if found.ndim == 3 else 0
    return math.isqrt(count) * patch if count > 0 and math.isqrt(count) ** 2 == count else None


def _load(net: Any, tensors: Mapping[str, Tensor], name: str, where: str) -> None:
    """Load all tensors but a classifier's, as they are or as timm itself converts them.

    Raises:
        UserError: naming at most ten differing keys and shapes.
    """
    expected = net.state_dict()
    found = _without_classifier(net, tensors)
    wrong = differences(found, expected)
    convert = getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", None)
    if wrong and convert is not None:
        _check_convertible(net, tensors, name, where)
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # some of timm's converters print
                found = _without_classifier(net, convert(dict(tensors), net))
        except Exception as error:  # converters raise anything for names that they do not know
            raise UserError(
                f"{where}: the file is not of timm's {name} ({summary(wrong)})"
            ) from error
        wrong = differences(found, expected)
    if wrong:
        raise UserError(f"{where}: the file is not of timm's {name}: {summary(wrong)}")
    net.load_state_dict(found, strict=True)


def _without_classifier(net: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without those of a classifier that the network does not have."""
    classifiers = net.pretrained_cfg.get("classifier") or ()
    classifiers = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
    heads = tuple(f"{name}." for name in (*classifiers, "head", "head_dist"))
    own = net.state_dict()
    return {
        name: value for name, value in tensors.items() if name in own or not name.startswith(heads)
    }


def _check_convertible(net: Any, tensors: Mapping[str, Tensor], name: str, where: str) -> None:
    """Refuse what timm's converters would change in silence: patches, biases of attention."""
    patch, own = "patch_embed.proj.weight", net.state_dict()
    if patch in tensors and patch in own and tensors[patch].ndim == 4:
        found, expected = tensors[patch].shape[-2:], own[patch].shape[-2:]
        if found != expected:
            raise UserError(
                f"{where}: the file is not of timm's {name}: patches of {found[-1]} px instead of "
                f"{expected[-1]}"
            )
    if "storage_tokens" in tensors and "blocks.0.attn.q_bias" not in own:
        biases = [value for key, value in tensors.items() if key.endswith("attn.qkv.bias")]
        if any(
            bool(part.any()) for bias in biases for part in (bias.chunk(3)[0], bias.chunk(3)[2])
        ):
            raise UserError(
                f"{where}: the file has biases of queries and values, which timm's {name} has not: "
                "name the model with qkvb"
            )


def _patch_size(net: Any) -> int | None:
    size = getattr(getattr(net, "patch_embed", None), "patch_size", None)
    sides = size if isinstance(size, tuple | list) else (size,)
    return int(sides[0]) if size is not None and len(set(sides)) == 1 else None


def _plain(content: Mapping[str, Any]) -> dict[str, Any]:
    """The same as plain data, for keys of caches and for headers."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(content), default=str))
    return plain
