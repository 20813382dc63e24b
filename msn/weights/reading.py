"""One reader for every kind of weight file and directory."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from msn.errors import UserError
from msn.weights import huggingface, timm
from msn.weights.checkpoints import newest_checkpoint
from msn.weights.files import open_weights
from msn.weights.official import split_encoder
from msn.weights.onnx import read_onnx
from msn.weights.weights import (
    BACKBONE_FILE,
    FORMAT,
    PUBLISHED_LICENCE,
    SCRATCH_LICENCE,
    UNKNOWN_LICENCE,
    Weights,
    check_channels,
    check_trunk,
    guessed_heads,
    infer_model,
    strip_prefix,
    widen,
)

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")

# What other people wrap a state dict in.
_WRAPPERS = ("state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")
# Classifiers, and what MAE's own files hold beside the encoder.
_NOT_TRUNK = ("head.", "head_dist.", "decoder_", "mask_token")
# Of our header, what is about the weights and not about the file.
_FILE_KEYS = ("format", "model", "head", "norm")


class _Parts(NamedTuple):
    source: str
    trunk: dict[str, Tensor]
    head: dict[str, Tensor] | None = None
    prototypes: Tensor | None = None
    anchor_trunk: dict[str, Tensor] | None = None
    anchor_head: dict[str, Tensor] | None = None
    meta: Mapping[str, Any] = {}
    model: Mapping[str, Any] = {}
    ignored: tuple[str, ...] = ()


def read_weights(path: str | Path, *, num_heads: int | None = None) -> Weights:
    """Read the weights of anything that we know, without running code from it.

    Args:
        path: a checkpoint of ours; a `backbone.safetensors`; a run directory (its backbone, or else
            its newest checkpoint); a state dict in timm's or Hugging Face's names (`.pth`, `.pt`,
            `.bin`, `.safetensors`); a timm directory; a Hugging Face ViTMSN, ViTMAE or ViT
            directory; a `.pth.tar` in the layout of facebookresearch/msn.
        num_heads: attention heads where the file cannot tell, else of no effect; default
            width // 64, for multiples of 64 alone.

    Raises:
        UserError: if there is nothing to read, it is damaged, carries code or belongs to another
            architecture.
    """
    path = Path(path)
    parts = _read_directory(path) if path.is_dir() else _read_file(path, {})
    trunk = widen(parts.trunk)
    model, assumed = infer_model(trunk, parts.model, num_heads, str(path))
    for part in (trunk, parts.anchor_trunk):
        if part is not None:
            check_trunk(part, model, str(path))
    if assumed and guessed_heads(int(model["embed_dim"])) is None:
        raise UserError(
            f"{path}: does not tell its number of attention heads, and width "
            f"{model['embed_dim']} is no multiple of the usual 64 a head: give model.num_heads"
        )
    return Weights(
        trunk=trunk,
        model=model,
        source=parts.source,
        head=_widen(parts.head),
        prototypes=parts.prototypes
        if parts.prototypes is None
        else widen({"": parts.prototypes})[""],
        anchor_trunk=_widen(parts.anchor_trunk),
        anchor_head=_widen(parts.anchor_head),
        meta={"licence": UNKNOWN_LICENCE, **parts.meta},
        ignored=parts.ignored,
        heads_assumed=assumed,
    )


def _read_directory(path: Path) -> _Parts:
    if (path / BACKBONE_FILE).is_file():
        return _read_file(path / BACKBONE_FILE, {})
    if (path / "config.json").is_file():
        return _read_model_directory(path)
    if newest := newest_checkpoint(path / "checkpoints") or newest_checkpoint(path):
        return _read_file(newest, {})
    for pattern in ("*.pth.tar", "*.onnx", "*.ckpt", "checkpoints/*.ckpt"):
        if found := list(path.glob(pattern)):
            return _read_file(max(found, key=lambda file: file.stat().st_mtime_ns), {})
    raise UserError(
        f"{path}: holds none of {BACKBONE_FILE}, config.json, *.pth.tar, *.onnx, checkpoints/*.ckpt"
    )


def _read_model_directory(path: Path) -> _Parts:
    """A directory in the manner of the Hugging Face Hub: config.json beside a weight file."""
    config = _read_json(path / "config.json")
    found = [path / name for name in WEIGHT_FILES if (path / name).is_file()]
    if not found:
        raise UserError(f"{path}: has a config.json but none of {', '.join(WEIGHT_FILES)}")
    where = str(path / "config.json")
    if "architecture" in config:
        told, source = timm.told_by_config(config, where), "timm"
    else:
        told = huggingface.told_by_config(config, where)
        source = huggingface.MODEL_TYPES[config["model_type"]]
        told |= _told_by_preprocessor(path / "preprocessor_config.json")
    parts = _read_file(found[0], told)
    licence = {"licence": PUBLISHED_LICENCE} if source == "huggingface" else {}
    return parts._replace(source=source, meta={**licence, **parts.meta})


def _told_by_preprocessor(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    content = _read_json(path)
    names = {"image_mean": "mean", "image_std": "std"}
    told = {ours: content[theirs] for theirs, ours in names.items() if theirs in content}
    for name, value in told.items():
        check_channels(value, f"{path}: image_{name}")
    return told


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold a JSON object")
    return content


def _read_file(path: Path, told: Mapping[str, Any]) -> _Parts:
    """Read one file; `told` is what files beside it say (num_heads, mean, std, licence)."""
    content, metadata = read_onnx(path) if path.suffix == ".onnx" else open_weights(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold a dictionary of tensors, got {type(content).__name__}")
    content = {name: value for name, value in content.items() if isinstance(name, str)}
    header = _header(content.get("msn"), metadata, path)
    parts = _interpret(content, header, str(path))
    if "norm" in header:
        parts.trunk.update(_original_norm(header["norm"], path))
    heads = {key: told[key] for key in told if key == "num_heads"}
    beside = {key: told[key] for key in told if key != "num_heads"}
    own = {key: value for key, value in header.items() if key not in _FILE_KEYS}
    if header and header.get("init") is None:
        own = {"licence": SCRATCH_LICENCE, **own}
    return parts._replace(
        meta={**parts.meta, **beside, **own}, model={**heads, **header.get("model", {})}
    )


def _header(entry: Any, metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    """What a file of ours says about itself; empty for others' files."""
    try:
        header = json.loads(metadata.get("msn", "{}")) if entry is None else entry
    except ValueError as error:
        raise UserError(f"{path}: damaged header ({error})") from error
    if not isinstance(header, dict) or not isinstance(header.get("model", {}), dict):
        raise UserError(f"{path}: damaged header (no JSON object)")
    for key in ("mean", "std"):
        if key in header:
            check_channels(header[key], f"{path}: header {key}")
    if header.get("format", FORMAT) != FORMAT:
        raise UserError(f"{path}: format {header['format']!r}, this version reads {FORMAT}")
    return header


def _original_norm(norm: Any, path: Path) -> dict[str, Tensor]:
    """The final norm that an export with a folded head replaced by the identity."""
    try:
        return {f"norm.{kind}": torch.tensor(norm[kind]) for kind in ("weight", "bias")}
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(f"{path}: damaged header (norm: {error!r})") from error


def _interpret(content: dict[str, Any], header: Mapping[str, Any], where: str) -> _Parts:
    """Tell layouts apart by their names."""
    if isinstance(content.get("target_encoder"), dict):
        return _official(content)
    states = content.get("state_dict")
    if isinstance(states, dict) and "network.target.trunk.cls_token" in states:
        return _checkpoint(states)
    tensors = _unwrapped(content, where)
    if huggingface.is_huggingface(tensors):
        trunk, ignored = huggingface.from_huggingface(tensors)
        return _Parts("huggingface", trunk, ignored=ignored)
    ignored = tuple(name for name in tensors if name.startswith(_NOT_TRUNK))
    trunk = {name: tensor for name, tensor in tensors.items() if name not in ignored}
    return _Parts(BACKBONE_FILE if header else "state dict", trunk, ignored=ignored)


def _official(content: Mapping[str, Any]) -> _Parts:
    trunk, head, ignored = split_encoder(content["target_encoder"])
    anchor_trunk, anchor_head = None, None
    if isinstance(content.get("encoder"), dict):
        anchor_trunk, anchor_head, _ = split_encoder(content["encoder"])
    epoch = content.get("epoch")
    return _Parts(
        source="released",
        trunk=trunk,
        head=head,
        prototypes=_tensor_or_none(content.get("prototypes")),
        anchor_trunk=anchor_trunk,
        anchor_head=anchor_head,
        meta={"licence": PUBLISHED_LICENCE} | ({} if epoch is None else {"epoch": epoch}),
        ignored=ignored,
    )


def _checkpoint(states: Mapping[str, Tensor]) -> _Parts:
    return _Parts(
        source="msn checkpoint",
        trunk=strip_prefix(states, "network.target.trunk."),
        head=strip_prefix(states, "network.target.head.") or None,
        prototypes=states.get("network.prototypes"),
        anchor_trunk=strip_prefix(states, "network.anchor.trunk.") or None,
        anchor_head=strip_prefix(states, "network.anchor.head.") or None,
    )


def _unwrapped(content: dict[str, Any], where: str) -> dict[str, Tensor]:
    """The state dict inside what people wrap around it, without the prefixes of DDP and compile."""
    for wrapper in _WRAPPERS:
        if isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    tensors = {
        name: value
        for name, value in content.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }
    if not tensors:
        raise UserError(f"{where}: holds no tensors")
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in tensors):
            tensors = strip_prefix(tensors, prefix)
    return tensors


def _tensor_or_none(value: Any) -> Tensor | None:
    return value if isinstance(value, Tensor) else None


def _widen(tensors: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
    return None if tensors is None else widen(tensors)
