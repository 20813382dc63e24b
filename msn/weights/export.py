"""Export weights to another library: write, load there, compare, and only then move into place."""

import dataclasses
import importlib.util
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from msn.errors import UserError
from msn.files import placed_at, utf8_path, write_bytes, write_checkpoint, writing_to
from msn.method.vit import PLAIN, VisionTransformer
from msn.weights import dino, huggingface, timm
from msn.weights.backbone import complete_meta, save_backbone
from msn.weights.card import model_card
from msn.weights.classifier import Classifier, fold
from msn.weights.mae import LoadedMAE, mae_method
from msn.weights.onnx import write_onnx
from msn.weights.parity import (
    OFFICIAL_FILE,
    ONNX_FILE,
    Loaded,
    bytes_of_scores,
    check,
    check_reconstruction,
    load_huggingface,
    load_official_in_timm,
    load_onnx,
    load_state_dict_in_timm,
    load_timm_directory,
    versions,
)
from msn.weights.reading import read_weights
from msn.weights.released import HEAD_PREFIX
from msn.weights.tensors import save_tensors
from msn.weights.weights import (
    BACKBONE_FILE,
    BASELINES,
    Family,
    Weights,
    build_trunk,
    family_of,
    resized_positions,
    say_notes,
    trunk_digest,
)

PARITY_FILE = "parity.json"
_MOST_PATCHES = 128  # per side; comparing attention over more takes many minutes


class Export(NamedTuple):
    """What an export writes."""

    weights: Weights
    """float32, at the size to be exported."""
    header: dict[str, Any]
    """What the weights are; kept in every file that has room for it."""
    head: Classifier | None
    """For huggingface alone."""
    model_type: str
    """Of transformers, for huggingface alone."""
    mae: Mapping[str, Any] | None
    """Settings of `MAE` if the decoder is exported too, for huggingface's vit_mae alone."""


class Format(NamedTuple):
    """How one kind of export is written and checked."""

    write: Callable[[Export, Path], None]
    """Fills an empty directory."""
    load: Callable[[Path], list[Loaded]]
    """Loads that directory in another library."""
    needs: tuple[str, ...] = ()
    """Packages that the core does not depend on."""
    extra: str = ""
    """The extra that installs them."""


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write indented JSON atomically."""
    write_bytes(path, (json.dumps(content, indent=2) + "\n").encode())


def _write_timm(export: Export, directory: Path) -> None:
    header = export.header
    config = timm.config(
        header["model"],
        mean=header["mean"],
        std=header["std"],
        licence=header["licence"],
        tag="mae" if header.get("kind") == "mae" else "msn",
    )
    write_json(directory / "config.json", config)
    save_tensors(directory / "model.safetensors", export.weights.trunk, _metadata(header))


def _write_huggingface(export: Export, directory: Path) -> None:
    header, trunk, head = dict(export.header), dict(export.weights.trunk), export.head
    extra = {}
    if head is not None:
        folded = fold(head, trunk["norm.weight"], trunk["norm.bias"])
        # `read_weights` restores this norm; Python's floats hold float32 exactly.
        header["norm"] = {kind: trunk[f"norm.{kind}"].tolist() for kind in ("weight", "bias")}
        trunk |= {"norm.weight": folded.norm_weight, "norm.bias": folded.norm_bias}
        weight = folded.weight
        if family_of(header["model"]) is Family.DINOV2:  # reads the mean of patches beside it
            weight = torch.cat([weight, torch.zeros_like(weight)], dim=1)
        extra = {"classifier.weight": weight, "classifier.bias": folded.bias}
    model, classes = header["model"], None if head is None else head.classes
    if family_of(model) is Family.VIT:
        tensors, prefix = huggingface.to_huggingface(trunk), "vit"
        kind, mae = export.model_type, export.mae
        config = huggingface.model_config(model, classes, model_type=kind, mae=mae)
    else:
        tensors, config = dino.to_huggingface(trunk, model), dino.model_config(model, classes)
        prefix = config["model_type"]
    if head is not None or export.mae is not None:
        tensors = {f"{prefix}.{name}": tensor for name, tensor in tensors.items()} | extra
    if export.mae is not None:
        tensors |= huggingface.decoder_to_huggingface(export.weights.decoder or {})
    # The weights' header has it too, but transformers drops that when it saves the model.
    config["msn"] = {
        key: header[key] for key in ("licence", "licence_link", "norm") if key in header
    }
    write_json(directory / "config.json", config)
    make = huggingface.preprocessor_config
    if export.mae is not None:
        make = huggingface.mae_preprocessor_config
    preprocessing = make(model["img_size"], mean=header["mean"], std=header["std"])
    write_json(directory / "preprocessor_config.json", preprocessing)
    save_tensors(directory / "model.safetensors", tensors, _metadata(header))


def _write_torch(export: Export, directory: Path) -> None:
    trunk = dict(export.weights.trunk)
    _save(directory / "backbone.pth", trunk)
    save_backbone(directory / BACKBONE_FILE, trunk, export.header)


def _write_official(export: Export, directory: Path) -> None:
    layout = {**official_layout(export.weights), "msn": export.header}
    _save(directory / OFFICIAL_FILE, layout)


def official_layout(weights: Weights) -> dict[str, Any]:
    """The dictionary that the reference's loaders read, to be saved by `torch.save`.

    It has `encoder` if the weights have an anchor, and `epoch` if they say one.

    Raises:
        UserError: if the trunk is not a plain ViT; the layout cannot express others.
    """
    if strange := [f"{key}={weights.model[key]}" for key in weights.model if key in PLAIN]:
        raise UserError(f"format=official: cannot express {', '.join(strange)}; format=torch can")
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


def _save(path: Path, content: dict[str, Any]) -> None:
    """As `torch.save`, with a checksum."""
    with writing_to(path):
        write_checkpoint(path, content)


def _write_onnx(export: Export, directory: Path) -> None:
    write_onnx(directory / ONNX_FILE, export.weights, export.header)


def _metadata(header: Mapping[str, Any]) -> dict[str, str]:
    return {"msn": json.dumps(header)}


FORMATS = {
    "timm": Format(_write_timm, load_timm_directory),
    "huggingface": Format(
        _write_huggingface, load_huggingface, needs=("transformers",), extra="hf"
    ),
    "torch": Format(_write_torch, load_state_dict_in_timm),
    "official": Format(_write_official, load_official_in_timm),
    "onnx": Format(
        _write_onnx, load_onnx, needs=("onnx", "onnxscript", "onnxruntime"), extra="onnx"
    ),
}


def export(
    weights: Weights,
    *,
    format: str,
    out: Path,
    image_size: int | None,
    head: Classifier | None,
    overwrite: bool,
    lowshot: list[dict[str, Any]] | None,
    model_type: str | None = None,
) -> dict[str, Any]:
    """Write a directory for another library and check that it computes the same there.

    Args:
        weights: what to export; converted to float32.
        format: one of `FORMATS`.
        out: the directory to make.
        image_size: native size of the export in px, a multiple of the patch size; None keeps that
            of the weights. Position embeddings are resized as in the paper.
        head: a classifier to put on top; for huggingface alone.
        overwrite: replace `out` if it exists.
        lowshot: rows of a lowshot.json for the model card, or None; figures of other weights or of
            another size are left out.
        model_type: for huggingface alone: vit_msn, vit, or vit_mae, which includes MAE's decoder
            (`ViTMAEForPreTraining`). None is vit_msn; for MAE's weights vit_mae with a decoder and
            without head, else vit.

    Returns:
        The content of `parity.json`.

    Raises:
        UserError: on a wrong argument, a failed comparison, or a place that cannot be written;
            `out` is left as it was.
    """
    kind = check_format(format, has_head=head is not None)
    _check_pool(weights, format)
    _check_same_backbone(weights, head)
    _check_free(out := out.resolve(), overwrite)
    resized = _at_size(weights, image_size)
    header = _without_paths(complete_meta({**weights.meta, "model": resized.model}))
    theirs = huggingface.choose_model_type(weights, format, model_type, has_head=head is not None)
    mae = _settings_of_mae(resized, weights, header) if theirs == "vit_mae" else None
    content = Export(resized, header, head, theirs, mae)
    with placed_at(out) as directory:
        kind.write(content, directory)
        trunk = build_trunk(resized)
        with utf8_path(directory) as place:
            loaded = kind.load(place)
        report = {"format": format, **check(trunk, head, loaded)}
        if mae is not None:
            report["reconstruction"] = check_reconstruction(LoadedMAE(resized, mae), loaded)
        report["weights_bit_equal"] = _check_round_trip(directory, trunk, resized, mae)
        report["versions"] = versions()
        write_json(directory / PARITY_FILE, report)
        card = model_card(
            format, header, head=head, report=report, lowshot=_about(resized, lowshot)
        )
        write_bytes(directory / "README.md", card.encode())
    return report


def check_format(name: str, *, has_head: bool) -> Format:
    """The format of that name.

    Raises:
        UserError: it does not exist, has no room for a head, or needs a package that is missing.
    """
    if name not in FORMATS:
        raise UserError(f"format must be one of {', '.join(FORMATS)}, got {name!r}")
    if has_head and name != "huggingface":
        raise UserError(f"head needs format=huggingface, got format={name}")
    kind = FORMATS[name]
    missing = [package for package in kind.needs if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(
            f"format={name} needs {', '.join(missing)}, which is not installed: "
            f"pip install 'msn-pretraining[{kind.extra}]'"
        )
    return kind


def _settings_of_mae(resized: Weights, weights: Weights, header: dict[str, Any]) -> dict[str, Any]:
    """Settings of `MAE`, which are added to the header."""
    if resized.model["img_size"] != weights.model["img_size"]:
        raise UserError(
            f"image_size={resized.model['img_size']}: the decoder is for "
            f"{weights.model['img_size']} px; model_type=vit writes the encoder alone at any size"
        )
    method, notes = mae_method(weights, {}, "checkpoint")
    say_notes(notes, "checkpoint")
    said = header.get("method")
    header["method"] = {**(said if isinstance(said, dict) else {}), **method}
    return method


def _check_pool(weights: Weights, format: str) -> None:
    if weights.meta.get("pool") == "mean" and format != "torch":
        raise UserError(
            f"format={format}: cannot express the feature of this fine-tuned MAE, the mean of "
            "patches through fc_norm; format=torch can"
        )


def _check_same_backbone(weights: Weights, head: Classifier | None) -> None:
    said = None if head is None else head.weights
    if said is not None and said != _digest(weights):
        raise UserError("head: was fitted on features of another backbone, not of this one")


def _without_paths(header: dict[str, Any]) -> dict[str, Any]:
    """The header without paths of the machine that made it, for exports are passed on.

    The name of `init` and the kind of data stay.
    """
    said: dict[str, Any] = {}
    if isinstance(header.get("data"), dict):
        said["data"] = {key: value for key, value in header["data"].items() if key != "root"}
    if isinstance(header.get("init"), str):
        model, _, file = header["init"].rpartition("@")
        known = model.startswith("timm/")
        said["init"] = f"{model}@{Path(file).name}" if known else Path(header["init"]).name
    return header | said


def _about(weights: Weights, rows: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
    """The rows of exactly these weights, and of the baselines."""
    digest = _digest(weights)
    size = weights.model["img_size"]
    own = [
        row for row in rows or [] if row.get("weights") == digest and row.get("image_size") == size
    ]
    names = {row["backbone"] for row in own}
    return [row for row in rows or [] if row["backbone"] in (*names, *BASELINES)] if own else None


def _digest(weights: Weights) -> str:
    return trunk_digest({name: tensor.float() for name, tensor in weights.trunk.items()})


def _check_free(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not overwrite:
        raise UserError(f"out={out} exists; overwrite=true replaces it")
    if not out.is_dir() or (any(out.iterdir()) and not _is_export(out)):
        raise UserError(
            f"out={out} is not an export (files with a {PARITY_FILE} of ours): not replaced"
        )


def _is_export(directory: Path) -> bool:
    """Whether we made a directory and nobody has added a folder to it."""
    try:
        report = json.loads((directory / PARITY_FILE).read_text())
    except (OSError, ValueError):
        return False
    ours = isinstance(report, dict) and report.get("format") in FORMATS
    return ours and not any(entry.is_dir() for entry in directory.iterdir())


def _at_size(weights: Weights, image_size: int | None) -> Weights:
    """The same weights in float32, with position embeddings for another image size."""
    trunk = {name: tensor.float() for name, tensor in weights.trunk.items()}
    if weights.decoder is not None:
        decoder = {name: tensor.float() for name, tensor in weights.decoder.items()}
        weights = dataclasses.replace(weights, decoder=decoder)
    model = dict(weights.model)
    if image_size is None or image_size == model["img_size"]:
        return dataclasses.replace(weights, trunk=trunk)
    patch = int(model["patch_size"])
    if not isinstance(image_size, int) or image_size < patch or image_size % patch:
        raise UserError(
            f"image_size must be a multiple of the patch size {patch}, got {image_size}"
        )
    if image_size > _MOST_PATCHES * patch:
        raise UserError(
            f"image_size={image_size}: must be at most {_MOST_PATCHES * patch}, that is "
            f"{_MOST_PATCHES} patches per side"
        )
    needed = bytes_of_scores((image_size // patch) ** 2 + 1, int(model["num_heads"]))
    limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > limit:
        raise UserError(
            f"image_size={image_size}: comparing the export would take {needed / 2**30:,.0f} GiB "
            f"and there are {limit / 2**30:,.0f}; lower it"
        )
    trunk, _ = resized_positions(trunk, model, image_size)
    anchor = weights.anchor_trunk
    if anchor is not None:
        anchor, _ = resized_positions(anchor, model, image_size)
    model["img_size"] = image_size
    return dataclasses.replace(weights, trunk=trunk, anchor_trunk=anchor, model=model)


def _check_round_trip(
    directory: Path, trunk: VisionTransformer, weights: Weights, mae: Mapping[str, Any] | None
) -> bool:
    """True; raises if the export does not read back bit by bit (our fault or the disk's)."""
    again = read_weights(directory, num_heads=trunk.num_heads)
    pairs = [(again.trunk, trunk.state_dict())]
    if mae is not None:
        pairs.append((again.decoder or {}, weights.decoder or {}))
    if not all(
        found.keys() == written.keys()
        and all(torch.equal(tensor, written[name]) for name, tensor in found.items())
        for found, written in pairs
    ):
        raise UserError("the export does not read back bit by bit; nothing written")
    return True
