"""`read_weights`, the one reader for every kind of weight file and directory; checkpoint names."""

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import hf_hub_url
from torch import Tensor

from msn.errors import UserError
from msn.files import damage
from msn.weights import dino, huggingface, timm
from msn.weights.architecture import check_trunk, find_trunk, infer_model
from msn.weights.families import (
    DINO,
    DINOV2,
    DINOV3,
    FINE_TUNED_MAE,
    MAE,
    PAPER,
    TIMM,
    Native,
    native_of_hugging_face,
    native_of_timm,
)
from msn.weights.hub import local_path
from msn.weights.onnx import read_onnx
from msn.weights.released import (
    POOLED,
    arguments_of_mae,
    decoder_of_mae,
    has_fixed_positions,
    pooled_norm,
    split_encoder,
)
from msn.weights.tensors import open_weights
from msn.weights.weights import (
    BACKBONE_FILE,
    EXACT_GELU,
    FORMAT,
    PUBLISHED_LICENCE,
    SCRATCH_LICENCE,
    UNKNOWN_LICENCE,
    Family,
    Weights,
    check_channels,
    check_plain,
    check_tensors,
    family_of,
    strip_prefix,
    summary,
    widen,
)

log = logging.getLogger(__name__)

OWN_LINK = "README.md#licence"  # in cards of earlier versions; it adds nothing
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
# Sorted by name, for times do not survive a copy.
_CHECKPOINT = re.compile(r"epoch-(\d+)-step-(\d+)\.ckpt")
_INDEX = ".index.json"
_MAX_JSON = 1 << 26
_OUR_CLASS_TOKEN = "network.target.trunk.cls_token"
# Prefixes of the names of our MAE, in a checkpoint and in its bare state dict.
_MAE_PREFIXES = ("network.", "")
# What files beside the weights may say about the architecture.
_NUMBERS = ("num_heads", "layer_norm_eps", "img_size", "rope_base", "family")

# Classifiers, and what MAE's and the reference's files hold beside the encoder.
_NOT_TRUNK = ("head.", "head_dist.", "fc.", "pred.", "decoder_", "mask_token")
# Sources that are tensors alone, without a header or a directory that says more.
_BARE = ("state dict", "huggingface")
# Keys of our header that are about the file, not about the weights.
_FILE_KEYS = ("format", "model", "head", "norm")


class _Parts(NamedTuple):
    source: str
    trunk: dict[str, Tensor]
    head: dict[str, Tensor] | None = None
    prototypes: Tensor | None = None
    anchor_trunk: dict[str, Tensor] | None = None
    anchor_head: dict[str, Tensor] | None = None
    decoder: dict[str, Tensor] | None = None
    meta: Mapping[str, Any] = {}
    model: Mapping[str, Any] = {}
    ignored: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    native: Native = PAPER


def read_weights(
    path: str | Path,
    *,
    num_heads: int | None = None,
    key: str | None = None,
    family: str | None = None,
) -> Weights:
    """Read the weights of any supported file or directory, without running code from it.

    Args:
        path: a checkpoint of ours; a `backbone.safetensors`; a run directory (its backbone, or else
            its newest checkpoint); a state dict in timm's or Hugging Face's names (`.pth`, `.pt`,
            `.bin`, `.safetensors`) or those of facebookresearch/dinov2 and dinov3; a timm
            directory; a Hugging Face directory of ViTMSN, ViTMAE, ViT, DINOv2 or DINOv3; a
            `.pth.tar` in the layout of facebookresearch/msn; or one of these directories on the
            Hugging Face Hub, `hf://USER/NAME[@REVISION]`.
        num_heads: attention heads, used only where the file does not say; None takes those of the
            published models of that width, if all have the same.
        key: which of several trunks in a file, e.g. `model_ema`; without it the error lists them.
        family: `vit`, `dinov2` or `dinov3` where names and shapes fit several, see `Family`.

    Raises:
        UserError: if there is nothing to read, it is damaged, carries code, holds several trunks,
            numbers that are not finite, or another architecture.
    """
    path, where = local_path(path), str(path)
    parts = _read_directory(path, key) if path.is_dir() else _read_file(path, {}, key)
    told = {**parts.model, "released": parts.source == "released"}
    model, assumed = infer_model(parts.trunk, told, num_heads, family, where)
    if not parts.model and parts.source in _BARE and family is None:
        assumed += (EXACT_GELU,)
    if parts.anchor_trunk is not None:
        check_trunk(parts.anchor_trunk, model, where)
    prototypes = {} if parts.prototypes is None else {"prototypes": parts.prototypes}
    for tensors in (parts.anchor_trunk, parts.head, parts.anchor_head, parts.decoder, prototypes):
        check_tensors(tensors or {}, where)
    return Weights(
        trunk=widen(parts.trunk),
        model=model,
        source=parts.source,
        head=_widen(parts.head),
        prototypes=widen(prototypes).get("prototypes"),
        anchor_trunk=_widen(parts.anchor_trunk),
        anchor_head=_widen(parts.anchor_head),
        decoder=_widen(parts.decoder),
        meta={"licence": UNKNOWN_LICENCE, **parts.meta},
        ignored=parts.ignored,
        notes=parts.notes + assumed,
        native=_native(parts, model),
    )


def _native(parts: _Parts, model: Mapping[str, Any]) -> Native:
    """The native feature of the weights' family; the paper's where no family is known."""
    told = parts.meta.get("native")  # of a backbone that was adapted from another family
    if isinstance(told, list) and len(told) == 2 and all(isinstance(part, str) for part in told):
        return Native(*told)
    ours = parts.source in (BACKBONE_FILE, "msn checkpoint", "mae checkpoint", "released")
    by_family = {Family.DINOV2: DINOV2, Family.DINOV3: DINOV3}
    return (
        parts.native
        if ours or parts.native is not PAPER
        else by_family.get(family_of(model), PAPER)
    )


def _read_directory(path: Path, key: str | None) -> _Parts:
    if (path / BACKBONE_FILE).is_file():
        return _read_file(path / BACKBONE_FILE, {}, key)
    if (path / "config.json").is_file():
        return _read_model_directory(path, key)
    newest = newest_valid_checkpoint(path / "checkpoints") or newest_valid_checkpoint(path)
    if newest is not None:
        return _read_file(newest, {}, key)
    for pattern in ("*.pth.tar", "*.onnx", "*.ckpt", "checkpoints/*.ckpt"):
        if found := [file for file in path.glob(pattern) if file.is_file()]:
            return _read_file(max(found, key=lambda file: file.stat().st_mtime_ns), {}, key)
    raise UserError(
        f"{path}: holds none of {BACKBONE_FILE}, config.json, *.pth.tar, *.onnx, checkpoints/*.ckpt"
    )


def _read_model_directory(path: Path, key: str | None) -> _Parts:
    """A directory as on the Hugging Face Hub: config.json beside a weight file."""
    config, file = read_json(path / "config.json"), model_file(path)
    where = str(path / "config.json")
    preprocessing = path / "preprocessor_config.json"
    if "architecture" in config:
        told, source, preprocessing = timm.told_by_config(config, where), "timm", Path(where)
    else:
        told = huggingface.told_by_config(config, where)
        source = (huggingface.MODEL_TYPES | dino.MODEL_TYPES)[config["model_type"]]
        if preprocessing.is_file():
            content = read_json(preprocessing)
            told |= huggingface.told_by_preprocessor(content, str(preprocessing))
    card = told_by_card(path / "README.md")
    if told.get("licence") == "other" and "licence" in card:
        del told["licence"]  # the card says its name
    if "licence" in told:
        card.pop("licence_link", None)  # it belongs to another licence
    parts = _read_file(file, {**card, **told}, key)
    _check_depth(config, parts.trunk, where)
    _restore_norm(parts.trunk, config.get("msn"), path / "config.json")
    notes = parts.notes
    if not {"mean", "std"} <= parts.meta.keys():
        notes += (f"mean and std of ImageNet assumed: {preprocessing.name} says none",)
    elif "mean" in told and list(told["mean"]) == [0.0] * 3:
        notes += (f"images are not normalised, as {preprocessing.name} says",)
    native = native_of_hugging_face(str(config.get("model_type"))) or PAPER
    if source == "timm":
        pretrained = config.get("pretrained_cfg") or {}
        native = native_of_timm(f"{config['architecture']}.{pretrained.get('tag')}")
    if native.feature == "pooled":
        native = TIMM  # of a plain vision transformer, that is the same
    if parts.source == BACKBONE_FILE:  # our header: what we trained or exported
        native = PAPER
    if parts.native is FINE_TUNED_MAE:
        native = FINE_TUNED_MAE
    return parts._replace(source=source, notes=notes, native=native)


def told_by_card(path: Path) -> dict[str, str]:
    """The licence in the front matter of a model card, if there is one, and a link to its text.

    A relative link is made absolute if the directory is in the Hub's cache, whose names give the
    repository.
    """
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8", errors="replace") as file:
        head = file.read(10_000)
    # Beside `license: other` stands its name.
    entry = r"---\n(?:.*\n)*?%s:(?! *[\"']?other\b) *[\"']?([\w. +-]+)[\"']? *\n"
    found = re.match(entry % "license", head) or re.match(entry % "license_name", head)
    if found is None:
        return {}
    told = {"licence": found[1].strip()}
    link = re.match(r"---\n(?:.*\n)*?license_link: *[\"']?([^\s\"']+)", head)
    if link is not None and link[1] != OWN_LINK:
        origin = re.search(r"models--([^/]+)/snapshots/([^/]+)$", str(path.parent.absolute()))
        told["licence_link"] = link[1]
        if origin is not None and "://" not in link[1]:
            name = origin[1].replace("--", "/")
            told["licence_link"] = hf_hub_url(name, link[1], revision=origin[2])
    return told


def _check_depth(config: Mapping[str, Any], trunk: Mapping[str, Tensor], where: str) -> None:
    """Refuse weights whose number of blocks is not that of their configuration."""
    arguments = config.get("model_args")
    timms = arguments.get("depth") if isinstance(arguments, dict) else None
    said = config.get("num_hidden_layers", timms)
    found = len({block[0] for name in trunk if (block := re.match(r"blocks\.\d+\.", name))})
    if said is not None and found and said != found:
        raise UserError(f"{where}: says {str(said)[:20]} blocks, the weights have {found}")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        UserError: it cannot be read, is larger than 64 MB or is not an object.
    """
    try:
        if path.stat().st_size > _MAX_JSON:
            raise UserError(f"{path}: larger than {_MAX_JSON >> 20} MB; a configuration is not")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: cannot be read as JSON ({str(error)[:80]})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold a JSON object")
    return content


def model_file(path: Path) -> Path:
    """The weight file, or its index, beside a config.json.

    Raises:
        UserError: if there is none.
    """
    names = [name + index for name in WEIGHT_FILES for index in ("", _INDEX)]
    found = [path / name for name in names if (path / name).is_file()]
    if not found:
        raise UserError(f"{path}: has a config.json but none of {', '.join(names)}")
    return found[0]


def open_content(path: Path) -> tuple[Any, dict[str, str]]:
    """What a weight file of any kind holds, as it is, and the metadata beside it.

    Raises:
        UserError: if it cannot be read or carries code.
    """
    if path.name.endswith(_INDEX):
        return _open_sharded(path)
    return read_onnx(path) if path.suffix == ".onnx" else open_weights(path)


def _open_sharded(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The tensors of all files that an index names; they stand beside it."""
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict) or not all(
        isinstance(file, str) and Path(file).name == file for file in places.values()
    ):
        raise UserError(f"{path}: weight_map must give each tensor the name of a file beside it")
    tensors: dict[str, Any] = {}
    for file in sorted(set(places.values())):
        content, _ = open_weights(path.with_name(file))
        tensors |= content if isinstance(content, dict) else {}
    if missing := [name for name in places if name not in tensors]:
        raise UserError(f"{path}: none of its files holds {summary(missing)}")
    return tensors, {}


def _read_file(path: Path, told: Mapping[str, Any], key: str | None) -> _Parts:
    """Read one file; `told` is what files beside it say (num_heads, mean, std, licence, ...)."""
    content, metadata = open_content(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold a dictionary of tensors, got {type(content).__name__}")
    content = {name: value for name, value in content.items() if isinstance(name, str)}
    header = _header(content.get("msn"), metadata, path)
    parts = _interpret(content, header, str(path), key)
    if "norm" in header:
        parts.trunk.update(_original_norm(header["norm"], path))
    numbers = {name: told[name] for name in told if name in _NUMBERS}
    beside = {name: told[name] for name in told if name not in _NUMBERS}
    own = {name: value for name, value in header.items() if name not in _FILE_KEYS}
    if "licence" in own:
        beside.pop("licence_link", None)  # it belongs to another licence
    if header and header.get("init") is None:
        own = {"licence": SCRATCH_LICENCE, **own}
    return parts._replace(
        meta={**parts.meta, **beside, **own},
        model={**parts.model, **numbers, **header.get("model", {})},
    )


def _header(entry: Any, metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    """The header of a file that we wrote; empty for other files."""
    try:
        header = json.loads(metadata.get("msn", "{}")) if entry is None else entry
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged header ({str(error)[:80]})") from error
    check_plain(header, str(path))
    if not isinstance(header, dict) or not isinstance(header.get("model", {}), dict):
        raise UserError(f"{path}: damaged header (no JSON object)")
    for key in ("mean", "std"):
        if key in header:
            check_channels(header[key], f"{path}: header {key}", positive=key == "std")
    if not all(isinstance(header.get(key, ""), str | None) for key in ("licence", "licence_link")):
        raise UserError(f"{path}: damaged header (licence)")
    if header.get("format", FORMAT) != FORMAT:
        raise UserError(
            f"{path}: format {str(header['format'])[:80]!r}, this version reads {FORMAT}"
        )
    return header


def _original_norm(norm: Any, path: Path) -> dict[str, Tensor]:
    """The final norm that an export with a folded head replaced by the identity."""
    try:
        return {f"norm.{kind}": torch.tensor(norm[kind]) for kind in ("weight", "bias")}
    except (KeyError, TypeError, ValueError, IndexError, OverflowError, RuntimeError) as error:
        raise UserError(f"{path}: damaged header (norm: {repr(error)[:80]})") from error


def _restore_norm(trunk: dict[str, Tensor], own: Any, path: Path) -> None:
    """Put the final norm back that an export with a folded head replaced by the identity.

    A norm that is no longer the identity was trained further and stays.
    """
    identity = {"norm.weight": 1, "norm.bias": 0}
    if not isinstance(own, dict) or "norm" not in own:
        return
    if all(name in trunk and bool((trunk[name] == kept).all()) for name, kept in identity.items()):
        trunk.update(_original_norm(own["norm"], path))


def _interpret(
    content: dict[str, Any], header: Mapping[str, Any], where: str, key: str | None
) -> _Parts:
    """Recognise the layout by its names; `key` chooses among all trunks of any layout."""
    states = content.get("state_dict")
    if key is None and isinstance(content.get("target_encoder"), dict):
        return _official(content, where)
    if key is None and isinstance(states, dict) and _OUR_CLASS_TOKEN in states:
        return _checkpoint(states, where)
    states = states if isinstance(states, dict) else content
    for prefix in _MAE_PREFIXES if key is None else ():
        if f"{prefix}decoder.mask_token" in states and f"{prefix}trunk.cls_token" in states:
            return _checkpoint_of_mae(states, prefix, where)
    found = find_trunk(content, key, where)
    notes = () if found.name == "." else (f"weights taken from {found.name}",)
    if (theirs := dino.translate(found.tensors, where)) is not None:
        beside = theirs.ignored + (*found.beside,)
        model = {"family": theirs.source.rpartition(" ")[2]}
        return _Parts(
            theirs.source, theirs.trunk, meta=theirs.meta, model=model, ignored=beside, notes=notes
        )
    ignored: tuple[str, ...]
    whole = {**found.beside, **found.tensors}
    if huggingface.is_huggingface(found.tensors):
        source = "huggingface"
        trunk, ignored = huggingface.from_huggingface(found.tensors)
        decoder = huggingface.decoder_from_huggingface(whole) or None
    else:
        source = BACKBONE_FILE if header else "state dict"
        ignored = tuple(name for name in found.tensors if name.startswith(_NOT_TRUNK))
        trunk = {name: tensor for name, tensor in found.tensors.items() if name not in ignored}
        decoder = decoder_of_mae(whole)
    meta: dict[str, Any] = {}
    native = DINO if {"student", "teacher"} <= content.keys() else PAPER
    if decoder is not None or (not header and has_fixed_positions(trunk, columns_first=True)):
        meta = {"kind": "mae", **arguments_of_mae(content)}
        native = PAPER if header else MAE
    if (pooled := pooled_norm(trunk)) is not None:
        trunk, meta, notes = pooled, {"pool": "mean"}, (*notes, POOLED)
        native = FINE_TUNED_MAE
    return _Parts(
        source,
        trunk,
        decoder=decoder,
        meta=meta,
        ignored=ignored + (*found.beside,),
        notes=notes,
        native=native,
    )


def _official(content: Mapping[str, Any], where: str) -> _Parts:
    trunk, head, ignored = split_encoder(content["target_encoder"])
    anchor_trunk, anchor_head = None, None
    if isinstance(content.get("encoder"), dict):
        anchor_trunk, anchor_head, _ = split_encoder(content["encoder"])
    if not trunk:
        raise UserError(f"{where}: target_encoder holds no tensors")
    epoch = content.get("epoch") if isinstance(content.get("epoch"), int) else None
    prototypes = content.get("prototypes")
    return _Parts(
        source="released",
        trunk=trunk,
        head=head,
        prototypes=prototypes if isinstance(prototypes, Tensor) else None,
        anchor_trunk=anchor_trunk,
        anchor_head=anchor_head,
        meta={"licence": PUBLISHED_LICENCE} | ({} if epoch is None else {"epoch": epoch}),
        ignored=ignored,
    )


def _checkpoint(content: Mapping[Any, Any], where: str) -> _Parts:
    states = _tensors_alone(content, where)
    return _Parts(
        source="msn checkpoint",
        trunk=strip_prefix(states, "network.target.trunk."),
        head=strip_prefix(states, "network.target.head.") or None,
        prototypes=states.get("network.prototypes"),
        anchor_trunk=strip_prefix(states, "network.anchor.trunk.") or None,
        anchor_head=strip_prefix(states, "network.anchor.head.") or None,
    )


def _checkpoint_of_mae(content: Mapping[Any, Any], prefix: str, where: str) -> _Parts:
    states = _tensors_alone(content, where)
    return _Parts(
        source="mae checkpoint",
        trunk=strip_prefix(states, f"{prefix}trunk."),
        decoder=strip_prefix(states, f"{prefix}decoder.") or None,
        meta={"kind": "mae"},
    )


def _tensors_alone(content: Mapping[Any, Any], where: str) -> dict[str, Tensor]:
    states = {name: value for name, value in content.items() if isinstance(name, str)}
    if not all(isinstance(value, Tensor) for value in states.values()):
        raise UserError(f"{where}: damaged: state_dict holds more than tensors")
    return states


def _widen(tensors: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
    return None if tensors is None else widen(tensors)


def checkpoints(directory: Path) -> list[Path]:
    """Checkpoint files of a directory, oldest first; none where there is no directory."""
    if not directory.is_dir():
        return []
    files = [path for path in directory.iterdir() if _CHECKPOINT.fullmatch(path.name)]
    return sorted(files, key=epoch_and_step)


def newest_checkpoint(directory: Path) -> Path | None:
    """The newest checkpoint file of a directory, None if there is none."""
    files = checkpoints(directory)
    return files[-1] if files else None


def newest_valid_checkpoint(directory: Path) -> Path | None:
    """The newest checkpoint file that is whole; the log names damaged ones, which are skipped.

    Reads each file that it considers once.
    """
    for path in reversed(checkpoints(directory)):
        reason = damage(path)
        if reason is None:
            return path
        log.warning("checkpoint %s is damaged (%s): skipped", path, reason)
    return None


def epoch_and_step(path: Path) -> tuple[int, int]:
    """Finished epochs and optimiser steps in a checkpoint's name."""
    match = _CHECKPOINT.fullmatch(path.name)
    assert match is not None
    return int(match[1]), int(match[2])
