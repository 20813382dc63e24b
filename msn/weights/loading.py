"""Exports as the libraries they are made for load them, for the parity check."""

import contextlib
import importlib.metadata
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn

from msn.errors import UserError
from msn.weights.files import open_weights
from msn.weights.parity import Loaded
from msn.weights.timm import plain_timm
from msn.weights.weights import BACKBONE_FILE, strip_prefix

OFFICIAL_FILE = "msn.pth.tar"
ONNX_FILE = "model.onnx"
LIBRARY = f"timm {timm.__version__}"
ATTENTION = ("sdpa", "eager")


def load_timm_directory(directory: Path) -> list[Loaded]:
    """By `timm.create_model("local-dir:...")`."""
    model = timm.create_model(f"local-dir:{directory}", pretrained=True).eval()
    assert isinstance(model, TimmVisionTransformer)
    return [Loaded(LIBRARY, "local-dir", model.forward_features, model)]


def load_state_dict_in_timm(directory: Path) -> list[Loaded]:
    """`backbone.pth` by torch, strictly into a vision transformer of timm."""
    content, _ = open_weights(directory / "backbone.pth")
    _, metadata = open_weights(directory / BACKBONE_FILE)
    model = json.loads(metadata["msn"])["model"]
    other = plain_timm(content, model)
    return [Loaded(LIBRARY, "backbone.pth", other.forward_features, other)]


def load_official_in_timm(directory: Path) -> list[Loaded]:
    """`target_encoder` as the reference's evaluation reads it, into timm."""
    content, _ = open_weights(directory / OFFICIAL_FILE)
    encoder = strip_prefix(content["target_encoder"], "module.")
    trunk = {name: tensor for name, tensor in encoder.items() if not name.startswith("fc.")}
    other = plain_timm(trunk, content["msn"]["model"])
    return [Loaded(LIBRARY, "target_encoder", other.forward_features, other)]


def load_huggingface(directory: Path) -> list[Loaded]:
    """By transformers, with each attention implementation; refuses missing or unexpected keys."""
    import transformers

    config = json.loads((directory / "config.json").read_text())
    name = config["architectures"][0]
    loaded = []
    for attention in ATTENTION:
        with _without_progress_bars(transformers.utils.logging):
            model, info = getattr(transformers, name).from_pretrained(
                directory, attn_implementation=attention, output_loading_info=True
            )
        wrong = {key: keys for key, keys in info.items() if keys}
        if wrong:
            raise UserError(f"transformers does not load the export as it is: {wrong}")
        loaded.append(_by_transformers(model.eval(), attention))
    return loaded


def load_onnx(directory: Path) -> list[Loaded]:
    """By onnxruntime on the CPU, one image at a time and in batches."""
    import onnxruntime

    session = onnxruntime.InferenceSession(
        directory / ONNX_FILE, providers=["CPUExecutionProvider"]
    )

    def features(images: Tensor) -> Tensor:
        # Batches of 1 and 3 prove that the batch axis is dynamic.
        parts = [images[:1], images[1:]]
        return torch.cat(
            [torch.from_numpy(session.run(None, {"pixel_values": p.numpy()})[0]) for p in parts]
        )

    return [Loaded(f"onnxruntime {onnxruntime.__version__}", "", features)]


def versions() -> dict[str, str]:
    """Installed versions of what an export may have met."""
    names = ("torch", "timm", "transformers", "safetensors", "onnx", "onnxruntime")
    found = {}
    for name in names:
        # Optional extras may be absent.
        for distribution in importlib.metadata.distributions(name=name):
            found[name] = distribution.version
    return found


@contextlib.contextmanager
def _without_progress_bars(logging: Any) -> Iterator[None]:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _by_transformers(model: nn.Module, attention: str) -> Loaded:
    import transformers

    classifies = hasattr(model, "classifier")

    def features(images: Tensor) -> Tensor:
        outputs = model(images, interpolate_pos_encoding=True)
        return outputs.logits if classifies else outputs.last_hidden_state

    return Loaded(f"transformers {transformers.__version__}", attention, features, model, True)
