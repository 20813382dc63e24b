"""`load_backbone`: open any backbone, in our own trunk if it fits, else in its own library."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
from torch import Tensor

from msn.errors import UserError
from msn.weights.architecture import OtherArchitecture, find_trunk
from msn.weights.backbone import Backbone
from msn.weights.families import POOLED, TIMM, native_of_timm
from msn.weights.foreign import ForeignBackbone
from msn.weights.foreign_huggingface import open_huggingface
from msn.weights.foreign_timm import open_timm
from msn.weights.hub import local_path
from msn.weights.reading import model_file, open_content, read_json, read_weights, told_by_card
from msn.weights.timm import check_same_model, named_model, timm_family, told_by_model
from msn.weights.weights import EXACT_GELU, Weights, check_heads, say_notes

_TIMM = "timm/"


def load_backbone(
    path: str | Path,
    *,
    num_heads: int | None = None,
    key: str | None = None,
    family: str | None = None,
) -> Backbone | ForeignBackbone:
    """Load any supported file or directory for use, in eval mode.

    Args:
        path: see `open_backbone_of`.
        num_heads: attention heads, used where the file does not say; a warning tells what is
            assumed.
        key: which of several trunks in the file, see `read_weights`.
        family: where names and shapes fit several families, see `read_weights`.

    Returns:
        Our trunk if the file fits it, else the network of timm or transformers, whose features are
        its family's (`msn.weights.families`).

    Raises:
        UserError: see `open_backbone_of`; or the file says another number of heads.
    """
    found = open_backbone_of(path, num_heads=num_heads, key=key, family=family)
    if isinstance(found, ForeignBackbone):
        if num_heads is not None:
            raise UserError(
                f"model.num_heads={num_heads}: {path} itself says its attention heads; leave the "
                "key out"
            )
        return found
    check_heads(found, num_heads, str(path))
    say_notes(found, str(path))
    return Backbone(found).eval()


def open_backbone_of(
    path: str | Path,
    *,
    num_heads: int | None = None,
    key: str | None = None,
    family: str | None = None,
    image_size: int | None = None,
) -> Weights | ForeignBackbone:
    """The weights for our trunk if the file fits it, else the library's backbone.

    Args:
        path: all that `read_weights` takes; a timm directory of any model; a Hugging Face directory
            that `AutoModel` and `AutoImageProcessor` open; or `timm/MODEL@FILE`, a model of timm by
            name with a local file.
        num_heads: used where the file does not say, see `read_weights`.
        key: which of several trunks in the file, see `read_weights`.
        family: where names and shapes fit several families, see `read_weights`.
        image_size: side in px for the library's backbone; None takes its own.

    Raises:
        UserError: see `read_weights`; or the file is not exactly of the model that its directory
            or the path names.
    """
    text = str(path)
    named = text.startswith(_TIMM) and not Path(text).exists()
    model, at, file = text.removeprefix(_TIMM).partition("@") if named else ("", "", text)
    if named and not (at and file):
        raise UserError(f"checkpoint={text}: write {_TIMM}MODEL@FILE")
    if not named:
        file = str(local_path(path))
    try:
        if named:
            return _named_weights(model, file, text, key, family)
        return read_weights(file, num_heads=num_heads, key=key, family=family)
    except OtherArchitecture as error:
        if named:
            tensors = _tensors(Path(file), key)
            return open_timm(model, tensors, {}, image_size=image_size, where=text)
        if not (Path(file) / "config.json").is_file():
            raise UserError(
                f"{error}; a bare file does not say its model: checkpoint={_TIMM}MODEL@FILE names "
                "one of timm's"
            ) from error
        return _of_directory(Path(file), key, image_size)


def _named_weights(
    name: str, file: str, where: str, key: str | None, family: str | None
) -> Weights:
    """Read the weights of a plain vision transformer of timm from a file."""
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('.')[0][:12]}*")[:5]
        hint = f"; similar are {', '.join(near)}" if near else ""
        raise UserError(
            f"checkpoint={_TIMM}{name}: timm {timm.__version__} has no such model{hint}"
        )
    model = named_model(name, f"checkpoint={_TIMM}{name}")
    told = told_by_model(model)
    family = timm_family(model) or family
    try:
        weights = read_weights(file, num_heads=told["num_heads"], key=key, family=family)
    except UserError:  # perhaps because the named model's heads do not divide the file's width
        weights = read_weights(file, num_heads=1, key=key, family=family)
        check_same_model(weights, model, f"checkpoint={where}")
        raise
    check_same_model(weights, model, f"checkpoint={where}")
    weights.model.update(told)  # its eps, if it differs from ours
    config = timm.models.get_pretrained_cfg(name)
    meta = {} if config is None else {"mean": config.mean, "std": config.std}
    notes = tuple(note for note in weights.notes if note != EXACT_GELU)  # the model is known
    native = native_of_timm(name)
    native = TIMM if native.feature == POOLED else native
    return replace(weights, notes=notes, meta={**meta, **weights.meta}, native=native)


def _tensors(file: Path, key: str | None) -> dict[str, Tensor]:
    """The tensors of the one trunk in a file, or of the one that `key` names."""
    content, _ = open_content(file)
    if not isinstance(content, dict):
        raise UserError(f"{file}: must hold a dictionary of tensors")
    return find_trunk(content, key, str(file)).tensors


def _whole(file: Path) -> dict[str, Tensor]:
    """All tensors of a file that holds one model."""
    content, _ = open_content(file)
    if not isinstance(content, dict) or not all(isinstance(t, Tensor) for t in content.values()):
        raise UserError(f"{file}: must hold the tensors of one model")
    return content


def _of_directory(path: Path, key: str | None, image_size: int | None) -> ForeignBackbone:
    """The backbone of a directory with a config.json that our trunk does not compute."""
    if key is not None:
        raise UserError(
            f"{path}: init_key={key}: a directory holds one backbone; leave the key out"
        )
    if (path / "adapter_config.json").is_file():
        raise UserError(f"{path}: holds an adapter beside its model; merge it and save the whole")
    config: dict[str, Any] = read_json(path / "config.json")
    tensors = _whole(model_file(path))
    if "architecture" in config:
        name = str(config["architecture"])
        return open_timm(name, tensors, config, image_size=image_size, where=str(path))
    meta = told_by_card(path / "README.md")
    return open_huggingface(path, config, tensors, meta, image_size=image_size)
