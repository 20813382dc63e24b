"""What each kind of export consists of, and which library checks it."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from msn.files import write_bytes, write_checkpoint, writing_to
from msn.weights import huggingface, loading, timm
from msn.weights.backbone import save_backbone
from msn.weights.classifier import Classifier, fold
from msn.weights.files import save_tensors
from msn.weights.official import official_layout
from msn.weights.onnx import write_onnx
from msn.weights.parity import Loaded
from msn.weights.weights import BACKBONE_FILE, Weights


class Export(NamedTuple):
    """What is to be written."""

    weights: Weights
    """float32, at the size to be exported."""
    header: dict[str, Any]
    """What the weights are; travels in every file that has room for it."""
    head: Classifier | None
    """For huggingface alone."""


class Format(NamedTuple):
    """How one kind of export is written and checked."""

    write: Callable[[Export, Path], None]
    """Fills an empty directory."""
    load: Callable[[Path], list[Loaded]]
    """Loads that directory in another library."""
    needs: tuple[str, ...] = ()
    """Packages that the core does not depend on."""
    extra: str = ""
    """The extra that has them."""


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write indented JSON atomically."""
    write_bytes(path, (json.dumps(content, indent=2) + "\n").encode())


def _write_timm(export: Export, directory: Path) -> None:
    header = export.header
    config = timm.config(
        header["model"], mean=header["mean"], std=header["std"], licence=header["licence"]
    )
    write_json(directory / "config.json", config)
    save_tensors(directory / "model.safetensors", export.weights.trunk, _metadata(header))


def _write_huggingface(export: Export, directory: Path) -> None:
    header, trunk, head = dict(export.header), dict(export.weights.trunk), export.head
    extra = {}
    if head is not None:
        folded = fold(head, trunk["norm.weight"], trunk["norm.bias"])
        # The norm that reading back restores; Python's floats hold float32 exactly.
        header["norm"] = {kind: trunk[f"norm.{kind}"].tolist() for kind in ("weight", "bias")}
        trunk |= {"norm.weight": folded.norm_weight, "norm.bias": folded.norm_bias}
        extra = {"classifier.weight": folded.weight, "classifier.bias": folded.bias}
    tensors, prefix = huggingface.to_huggingface(trunk), "" if head is None else "vit."
    tensors = {prefix + name: tensor for name, tensor in tensors.items()} | extra
    model, classes = header["model"], None if head is None else head.classes
    config = huggingface.model_config(model, classes)
    # The header of the weights says it too, but transformers drops that when it saves the model.
    config["msn"] = {key: header[key] for key in ("licence", "norm") if key in header}
    write_json(directory / "config.json", config)
    preprocessing = huggingface.preprocessor_config(
        model["img_size"], mean=header["mean"], std=header["std"]
    )
    write_json(directory / "preprocessor_config.json", preprocessing)
    save_tensors(directory / "model.safetensors", tensors, _metadata(header))


def _write_torch(export: Export, directory: Path) -> None:
    trunk = dict(export.weights.trunk)
    _save(directory / "backbone.pth", trunk)
    save_backbone(directory / BACKBONE_FILE, trunk, export.header)


def _write_official(export: Export, directory: Path) -> None:
    layout = {**official_layout(export.weights), "msn": export.header}
    _save(directory / loading.OFFICIAL_FILE, layout)


def _save(path: Path, content: dict[str, Any]) -> None:
    """As `torch.save`, with a checksum."""
    with writing_to(path):
        write_checkpoint(path, content)


def _write_onnx(export: Export, directory: Path) -> None:
    write_onnx(directory / loading.ONNX_FILE, export.weights, export.header)


def _metadata(header: Mapping[str, Any]) -> dict[str, str]:
    return {"msn": json.dumps(header)}


FORMATS = {
    "timm": Format(_write_timm, loading.load_timm_directory),
    "huggingface": Format(
        _write_huggingface, loading.load_huggingface, needs=("transformers",), extra="hf"
    ),
    "torch": Format(_write_torch, loading.load_state_dict_in_timm),
    "official": Format(_write_official, loading.load_official_in_timm),
    "onnx": Format(
        _write_onnx, loading.load_onnx, needs=("onnx", "onnxscript", "onnxruntime"), extra="onnx"
    ),
}
