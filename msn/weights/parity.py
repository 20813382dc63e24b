"""Compare an export, as another library loads it, with our network: fixed images, on the CPU.

The features compared are all tokens after the final norm, [B, 1 + N, D].
"""

import copy
import importlib.metadata
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from msn.errors import UserError
from msn.method.mae import MAE
from msn.method.vit import VisionTransformer
from msn.weights.classifier import Classifier, layer_norm_factor, predict
from msn.weights.foreign_huggingface import quiet
from msn.weights.tensors import open_weights
from msn.weights.timm import timm_twin
from msn.weights.weights import BACKBONE_FILE, strip_prefix

OFFICIAL_FILE = "msn.pth.tar"
ONNX_FILE = "model.onnx"
_TIMM = f"timm {timm.__version__}"

TOLERANCE = 1e-5
# Where a model's own float32 rounding is coarser than TOLERANCE, two correct implementations differ
# by about that much. A wrong conversion differs by orders of magnitude more.
ROUNDING_FACTOR = 4
HALF_TYPES = (torch.bfloat16, torch.float16)
IMAGES = "2 of noise, 2 smooth; seed 0"


@dataclass(frozen=True)
class Loaded:
    """An export as another library loaded it."""

    library: str
    """Name and version."""
    variant: str
    """Which variant of the library, e.g. its attention implementation; may be empty."""
    features: Callable[[Tensor], Tensor]
    """Images [B, 3, S, S] to tokens [B, 1 + N, D], or to logits [B, C] with a head."""
    module: nn.Module | None = None
    """What to cast to half precision; None where the format is float32 only."""
    other_sizes: bool = False
    """Whether it takes images of other sizes than the native one."""


def fixed_images(size: int) -> Tensor:
    """The images of every comparison, as after normalisation, [4, 3, size, size]."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 3, size, size, generator=generator)
    ramp = torch.linspace(-2, 2, size)
    smooth = torch.stack([ramp.expand(size, size), torch.cos(3 * ramp)[:, None] * ramp])
    return torch.cat([noise, smooth[:, None].expand(-1, 3, -1, -1)])


def bytes_of_scores(tokens: int, heads: int) -> int:
    """Memory of eager attention for the fixed images: scores and their softmax in float32."""
    return 2 * 4 * len(fixed_images(1)) * heads * tokens**2


def other_size(trunk: VisionTransformer) -> int:
    """A second image size: 96 px for patches of 16 at 224, as focal views are."""
    side = trunk.img_size // trunk.patch_size
    return trunk.patch_size * max(1, side * 3 // 7)


@torch.no_grad()
def check(
    trunk: VisionTransformer, head: Classifier | None, loaded: list[Loaded]
) -> dict[str, Any]:
    """Compare features, or with a head logits, of an export as loaded with ours.

    Args:
        trunk: ours, float32, in eval mode.
        head: the classifier in the export, if any.
        loaded: the export in another library, in each variant to compare.

    Returns:
        Plain data for `parity.json`.

    Raises:
        UserError: if any difference is above its tolerance.
    """
    comparisons = []
    for other in loaded:
        sizes = [trunk.img_size] + ([other_size(trunk)] if other.other_sizes else [])
        for size in sizes:
            comparison = _compare(trunk, head, other, fixed_images(size))
            comparisons.append({"variant": other.variant, "image_size": size, **comparison})
    failed = [row for row in comparisons if not _passes(row)]
    if failed:
        worst = max(failed, key=lambda row: row["max_abs_difference"])
        raise UserError(
            f"parity with {loaded[0].library} failed at {worst['image_size']} px: max difference "
            f"{worst['max_abs_difference']:.2e}, allowed {worst['tolerance']:.0e}; nothing written"
        )
    return {
        "checked_with": loaded[0].library,
        "compared": "tokens after the final norm" if head is None else "logits of the head",
        "images": IMAGES,
        "max_abs_difference": max(row["max_abs_difference"] for row in comparisons),
        "mean_abs_difference": max(row["mean_abs_difference"] for row in comparisons),
        "tolerance": max(row["tolerance"] for row in comparisons),
        "comparisons": comparisons,
        "half_precision": _half_precision(loaded[0], fixed_images(trunk.img_size)),
    }


@torch.no_grad()
def check_reconstruction(mae: MAE, loaded: list[Loaded]) -> dict[str, Any]:
    """Compare predictions of all patches and the loss with those of transformers, by a fixed mask.

    Args:
        mae: ours, float32.
        loaded: the `ViTMAEForPreTraining` of an export, in each variant to compare.

    Returns:
        Plain data for `parity.json`.

    Raises:
        UserError: if any difference is above its tolerance.
    """
    pixels = fixed_images(mae.trunk.img_size)
    patches = (mae.trunk.img_size // mae.trunk.patch_size) ** 2
    noise = torch.rand(len(pixels), patches, generator=torch.Generator().manual_seed(0))
    ours = mae.eval()(pixels, noise)
    exact = copy.deepcopy(mae).double()(pixels.double(), noise)
    rounding = float((ours.prediction - exact.prediction).abs().max())
    tolerance = max(TOLERANCE, ROUNDING_FACTOR * rounding)
    outputs = [other.module(pixels, noise=noise) for other in loaded if other.module is not None]
    most = max(float((ours.prediction - found.logits).abs().max()) for found in outputs)
    loss = max(float((ours.loss - found.loss).abs()) for found in outputs)
    if not (most <= tolerance and loss <= tolerance):  # NaN fails
        raise UserError(
            f"parity with {loaded[0].library} failed: reconstructions differ by {most:.2e}, losses "
            f"by {loss:.2e}, allowed {tolerance:.0e}; nothing written"
        )
    return {
        "compared": "predictions of all patches and loss, with a fixed mask",
        "max_abs_difference": most,
        "loss_abs_difference": loss,
        "tolerance": tolerance,
    }


def _compare(
    trunk: VisionTransformer, head: Classifier | None, other: Loaded, images: Tensor
) -> dict[str, Any]:
    ours, theirs = _ours(trunk, head, images), other.features(images)
    if ours.shape != theirs.shape:
        raise UserError(
            f"parity with {other.library} failed: shape {list(theirs.shape)} instead of "
            f"{list(ours.shape)}; nothing written"
        )
    difference = (ours - theirs).abs()
    row = {
        "max_abs_difference": float(difference.max()),
        "mean_abs_difference": float(difference.mean()),
        "tolerance": TOLERANCE,
    }
    if row["max_abs_difference"] > TOLERANCE:
        exact = _ours(copy.deepcopy(trunk).double(), head, images.double())
        row["float32_rounding"] = float((ours - exact).abs().max())
        row["tolerance"] = max(TOLERANCE, ROUNDING_FACTOR * row["float32_rounding"])
    if head is not None:
        row["same_predictions"] = _same_predictions(trunk, head, images, theirs)
    return row


def _ours(trunk: VisionTransformer, head: Classifier | None, images: Tensor) -> Tensor:
    if head is None:
        return trunk.forward_features(images, norm=True)
    tokens = trunk.forward_features(images, norm=False)[:, 0]
    # eps scales the logits of each image by its own factor: the export has it by construction.
    return predict(head, tokens, trunk.norm) * layer_norm_factor(head, tokens, trunk.norm.eps)


def _same_predictions(
    trunk: VisionTransformer, head: Classifier, images: Tensor, theirs: Tensor
) -> bool:
    """Whether the top class is the same, or is tied within the tolerance."""
    ours = predict(head, trunk.forward_features(images, norm=False)[:, 0], trunk.norm)
    chosen = ours.gather(1, theirs.argmax(dim=1, keepdim=True))
    return bool((ours.amax(dim=1, keepdim=True) - chosen <= TOLERANCE).all())


def _passes(row: dict[str, Any]) -> bool:
    # Written so that NaN fails.
    within = row["max_abs_difference"] <= row["tolerance"]
    return within and row.get("same_predictions", True)


def _half_precision(loaded: Loaded, images: Tensor) -> dict[str, Any]:
    """How far the export moves from its own float32 features in bfloat16 and float16."""
    if loaded.module is None:
        return {}
    full, report = loaded.features(images), {}
    original = copy.deepcopy(loaded.module.state_dict())
    for dtype in HALF_TYPES:
        loaded.module.to(dtype)
        difference = (loaded.features(images.to(dtype)).float() - full).abs()
        report[str(dtype).removeprefix("torch.")] = {
            "max_abs_difference": _finite(difference.max()),
            "mean_abs_difference": _finite(difference.mean()),
        }
        loaded.module.float().load_state_dict(original)
    return report


def _finite(value: Tensor) -> float | str:
    """JSON has no infinity; float16 may overflow."""
    return float(value) if bool(value.isfinite()) else "not finite"


def load_timm_directory(directory: Path) -> list[Loaded]:
    """By `timm.create_model("local-dir:...")`."""
    model: Any = timm.create_model(f"local-dir:{directory}", pretrained=True).eval()
    return [Loaded(_TIMM, "local-dir", model.forward_features, model)]


def load_state_dict_in_timm(directory: Path) -> list[Loaded]:
    """`backbone.pth` by torch, strictly into a vision transformer of timm."""
    content, _ = open_weights(directory / "backbone.pth")
    _, metadata = open_weights(directory / BACKBONE_FILE)
    model = json.loads(metadata["msn"])["model"]
    other = timm_twin(content, model)
    return [Loaded(_TIMM, "backbone.pth", other.forward_features, other)]


def load_official_in_timm(directory: Path) -> list[Loaded]:
    """`target_encoder` as the reference's evaluation reads it, into timm."""
    content, _ = open_weights(directory / OFFICIAL_FILE)
    encoder = strip_prefix(content["target_encoder"], "module.")
    trunk = {name: tensor for name, tensor in encoder.items() if not name.startswith("fc.")}
    other = timm_twin(trunk, content["msn"]["model"])
    return [Loaded(_TIMM, "target_encoder", other.forward_features, other)]


def load_huggingface(directory: Path) -> list[Loaded]:
    """By transformers, with each attention implementation; refuses missing or unexpected keys."""
    import transformers

    config = json.loads((directory / "config.json").read_text())
    name = config["architectures"][0]
    loaded = []
    for attention in ("sdpa", "eager"):
        with quiet(transformers):
            # Scripts leave the pooler of ViT, which no pretraining trains, at random.
            more = {"add_pooling_layer": False} if name == "ViTModel" else {}
            model, info = getattr(transformers, name).from_pretrained(
                directory, attn_implementation=attention, output_loading_info=True, **more
            )
        wrong = {key: keys for key, keys in info.items() if keys}
        if wrong:
            raise UserError(f"transformers does not load the export completely: {wrong}")
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
    """Installed versions of the libraries that write and check exports."""
    names = ("torch", "timm", "transformers", "safetensors", "onnx", "onnxruntime")
    return {
        name: distribution.version
        for name in names
        for distribution in importlib.metadata.distributions(name=name)  # extras may be absent
    }


def _by_transformers(model: nn.Module, attention: str) -> Loaded:
    import transformers

    classifies, masks = hasattr(model, "classifier"), hasattr(model, "decoder")
    config: Any = model.config
    # DINOv2's and DINOv3's models take images of any size by default.
    asked = {"interpolate_pos_encoding": True} if config.model_type in ("vit_msn", "vit") else {}

    def features(images: Tensor) -> Tensor:
        if masks:
            return _unmasked(model.get_submodule("vit"), images)
        outputs = model(images, **asked)
        return outputs.logits if classifies else outputs.last_hidden_state

    return Loaded(f"transformers {transformers.__version__}", attention, features, model, True)


def _unmasked(model: Any, images: Tensor) -> Tensor:
    """All tokens of a `ViTMAEModel`, which masks at inference too and shuffles by its noise."""
    ratio, model.config.mask_ratio = model.config.mask_ratio, 0.0
    try:
        side = model.config.patch_size
        count = (images.shape[-2] // side) * (images.shape[-1] // side)
        order = torch.arange(count, dtype=torch.float32).expand(len(images), -1)
        return model(images, noise=order, interpolate_pos_encoding=True).last_hidden_state
    finally:
        model.config.mask_ratio = ratio
