"""Any vision model of transformers as a frozen backbone: its own forward and image processor."""

import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from msn.errors import UserError, brief
from msn.weights.families import native_of_hugging_face
from msn.weights.foreign import Card, ForeignBackbone, checked
from msn.weights.huggingface import told_by_preprocessor
from msn.weights.weights import IMAGENET_MEAN, IMAGENET_STD, UNKNOWN_LICENCE, summary

PROCESSOR = "preprocessor_config.json"
# Of a config.json, what makes transformers run code, fetch or compute with other numbers.
_REFUSED = {
    "auto_map": "names code to run, which nothing here does",
    "quantization_config": "is quantised; save it in float32",
    "use_timm_backbone": "is a model of timm; save it as a timm directory",
    "backbone": "names another backbone to fetch",
}
_NORMS = ("layernorm", "norm", "post_layernorm", "layer_norm", "rms_norm")
# What only pretraining or a classifier uses.
_BESIDE = ("decoder.", "classifier.", "lm_head.", "head.", "mask_token", "logit_", "text_")
_PROBE = (60, 100)  # px: an image that shows whether a processor gives squares


def open_huggingface(
    directory: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    *,
    image_size: int | None,
) -> ForeignBackbone:
    """A Hugging Face directory as `AutoModel` and `AutoImageProcessor` open it.

    Args:
        directory: with `preprocessor_config.json`.
        config: its `config.json`.
        tensors: its weights.
        meta: what its card says.
        image_size: side of the images in px; None takes the processor's own.

    Raises:
        UserError: if it carries code, transformers does not know it or is not installed, weights
            are missing, or the processor gives no square images.
    """
    where, kind = str(directory), str(config.get("model_type"))
    _refuse(config, f"{where}/config.json")
    tensors = checked(tensors, where)
    transformers = _transformers(where, kind)
    processor, content = _processor(transformers, directory)
    native = _side(processor, where)
    size = native if image_size is None else image_size
    if size != native:
        _scale(processor, size / native)
        if _side(processor, where) != size:
            raise UserError(f"{where}: its image processor cannot give {size} px, only {native} px")
    build = partial(_create, transformers, kind, config, tensors, where)
    net = build(load=True)
    normalised = told_by_preprocessor(content, f"{where}/{PROCESSOR}")
    card = Card(
        where=where,
        library=f"transformers {transformers.__version__}",
        image_size=size,
        native=native_of_hugging_face(kind),
        transform=_Processed(processor),
        preprocessing=json.loads(
            json.dumps(
                {"transformers": transformers.__version__, **processor.to_dict()}, default=str
            )
        ),
        mean=tuple(normalised.get("mean", IMAGENET_MEAN)),
        std=tuple(normalised.get("std", IMAGENET_STD)),
        patch_size=net.patch_size,
        has_class_token=net.patch_size is not None,
        meta={"licence": UNKNOWN_LICENCE, **meta, "kind": f"huggingface {kind}"},
        model_config={"transformers": transformers.__version__, **config},
        build=partial(build, load=False),
    )
    return ForeignBackbone(net, net.norm, card)


class _Tower(nn.Module):
    """The vision part of a model of transformers: images in, what it pools out."""

    patch_size: int | None

    def __init__(self, model: nn.Module, size: Any) -> None:
        super().__init__()
        self.model = getattr(model, "vision_model", model)
        config = self.model.config
        patch = getattr(config, "patch_size", None)
        # In a pyramid the patch size does not give the number of tokens.
        self.patch_size = (
            patch if isinstance(patch, int) and not hasattr(config, "depths") else None
        )
        children = dict(self.model.named_children())
        norms = [name for name in _NORMS if name in children]
        self.norm = f"model.{norms[0]}" if norms else None
        parameters = inspect.signature(self.model.forward).parameters
        self.interpolates = "interpolate_pos_encoding" in parameters
        self.masks = getattr(config, "model_type", None) == "vit_mae"
        self.native_size = size

    def forward(self, images: Tensor) -> Tensor | None:
        more: dict[str, Any] = {}
        if self.interpolates and images.shape[-1] != self.native_size:
            more["interpolate_pos_encoding"] = True
        if self.masks and self.patch_size is not None:
            # Noise in order: with nothing masked, patches stay where they are.
            count = (images.shape[-2] // self.patch_size) * (images.shape[-1] // self.patch_size)
            more["noise"] = (
                torch.arange(count, device=images.device).expand(len(images), -1).float()
            )
        pooled: Tensor | None = getattr(self.model(images, **more), "pooler_output", None)
        return pooled


class _Processed:
    """An image processor as a transform; a class, so that it travels to workers."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, image: Image.Image) -> Tensor:
        pixels: Tensor = self.processor(images=image, return_tensors="pt")["pixel_values"][0]
        return pixels


def _refuse(config: Mapping[str, Any], where: str) -> None:
    """Refuse a configuration, or a nested one, that asks for more than its own network."""
    for key, why in _REFUSED.items():
        if config.get(key):
            raise UserError(f"{where}: refused: {key} {why}")
    for part in config.values():
        if isinstance(part, dict):
            _refuse(part, where)


def _transformers(where: str, kind: str) -> Any:
    try:
        import transformers
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    except ImportError:
        raise UserError(
            f"{where}: model_type {kind!r} is measured by transformers: pip install "
            "'msn-pretraining[hf]'"
        ) from None
    if kind not in CONFIG_MAPPING:
        raise UserError(
            f"{where}: transformers {transformers.__version__} has no model_type {kind[:80]!r}"
        )
    return transformers


def _create(
    transformers: Any,
    kind: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    where: str,
    *,
    load: bool,
) -> _Tower:
    """The network, with the weights of the file or with random ones."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    numbers = {key: value for key, value in config.items() if "attn_implementation" not in key}
    if kind == "vit_mae":
        numbers["mask_ratio"] = 0.0
    try:
        settings = CONFIG_MAPPING[kind].from_dict({**numbers, "dtype": "float32"})
        made: Any = MODEL_MAPPING[type(settings)]
        made = made[0] if isinstance(made, tuple) else made
        more: dict[str, Any] = {}
        if "add_pooling_layer" in inspect.signature(made.__init__).parameters:
            more["add_pooling_layer"] = _has_pooler(made, settings, tensors)
        with quiet(transformers):
            if not load:
                return _Tower(made(settings, **more), _image_size(settings))
            model, told = made.from_pretrained(
                None,
                config=settings,
                state_dict=dict(tensors),
                output_loading_info=True,
                dtype=torch.float32,
                **more,
            )
    except Exception as error:  # configurations and files of others: anything can be wrong in them
        raise UserError(
            f"{where}: transformers {transformers.__version__} cannot open it ({brief(error, 160)})"
        ) from error
    _check_loaded(told, where)
    return _Tower(model, _image_size(settings))


def _has_pooler(made: Any, settings: Any, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a file holds all that the pooler of a model needs, which may be nothing."""
    with torch.device("meta"):
        names = made(settings, add_pooling_layer=True).state_dict()
    needed = [name for name in names if name.startswith("pooler.")]
    return all(any(found.endswith(name) for found in tensors) for name in needed)


def _image_size(settings: Any) -> int | None:
    """Image side in px of the position embeddings; None where it is not a number."""
    size = getattr(getattr(settings, "vision_config", settings), "image_size", None)
    return size if isinstance(size, int) else None


def _check_loaded(told: Mapping[str, Any], where: str) -> None:
    """Refuse a network of which a part is not in the file; text towers and heads do not count."""
    missing = [name for name in told["missing_keys"] if not name.startswith(_BESIDE)]
    wrong = [f"{name} is missing" for name in sorted(missing)]
    wrong += [f"{entry[0]} has another shape" for entry in told["mismatched_keys"]]
    wrong += [
        f"{name} is not expected"
        for name in sorted(told["unexpected_keys"])
        if not any(part in name for part in _BESIDE) and not name.startswith("pooler.")
    ]
    if wrong:
        raise UserError(f"{where}: the weights are not those of its config.json: {summary(wrong)}")


def _processor(transformers: Any, directory: Path) -> tuple[Any, dict[str, Any]]:
    """The image processor of a directory, and its file."""
    file = directory / PROCESSOR
    if not file.is_file():
        raise UserError(
            f"{directory}: has no {PROCESSOR}, which says how images are prepared; save it with "
            "AutoImageProcessor.save_pretrained"
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        _refuse(content, str(file))
        with quiet(transformers):
            found = transformers.AutoImageProcessor.from_pretrained(
                str(directory), local_files_only=True, trust_remote_code=False
            )
    except UserError:
        raise
    except Exception as error:  # as above: a file of others
        raise UserError(f"{file}: transformers cannot open it ({brief(error)})") from error
    return found, content


def _side(processor: Any, where: str) -> int:
    """Side in px of a processor's output.

    Raises:
        UserError: if it does not turn every image into one square.
    """
    try:
        pixels = _Processed(processor)(Image.new("RGB", _PROBE))
    except Exception as error:  # as above
        raise UserError(f"{where}: its image processor fails ({brief(error)})") from error
    shape = list(getattr(pixels, "shape", ()))
    if len(shape) != 3 or shape[0] != 3 or shape[1] != shape[2]:
        raise UserError(
            f"{where}: its image processor gives {shape} for an image of 60 x 100 px; one square "
            "of 3 channels is needed, as with do_center_crop"
        )
    return int(shape[1])


def _scale(processor: Any, factor: float) -> None:
    """Change the size and keep the ratio of resizing to crop."""
    for name in ("size", "crop_size"):
        sizes = getattr(processor, name, None)
        if sizes is not None:
            scaled = {k: round(v * factor) for k, v in dict(sizes).items() if v is not None}
            setattr(processor, name, scaled if isinstance(sizes, dict) else type(sizes)(**scaled))


@contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Within, the library shows no progress bars and no warnings: we report what is wrong."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
